//! How well failures are foretold: on recorded engines and drives, and on made ramps.
//!
//! Read `assess` (what is measured and how), `engines`, `drives` and `ramps` (on what), `floor` (what has to be
//! beaten).

mod assess;
mod dataset;
mod drives;
mod engines;
mod floor;
mod metric;
mod ramps;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use theriac_command::output::{self, Format};
use theriac_command::progress::Steps;
use theriac_model::risk::RiskError;
use theriac_model::risk::predictor::Predictor;

pub use assess::{Assessment, Fallback, HorizonFigures, TimeFigures};
pub use dataset::DataError;
use dataset::Dataset;

/// Judges the risk model on recorded engines and drives and on made ramps.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Directory with cmapss/ and backblaze/; without it only the made ramps are judged.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Directory for risk.json (the figures) and ramps-model.json (a model that an edge can use).
    #[arg(long, value_name = "DIR", default_value = "theriac-risk")]
    pub out: PathBuf,
    /// How often the units are dealt into five folds anew; the first time as the floors deal them.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub partitions: u32,
    /// Made lives of services.
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(50..=5_000))]
    pub lives: u32,
    /// Seed of the folds and of the made lives.
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// `human`, or `json` for the figures on standard output.
    #[arg(long, default_value = "human")]
    pub format: Format,
}

/// Why nothing was judged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RiskRunError {
    /// Data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// No model can be fitted.
    #[error("{name}: {source}")]
    Fit {
        /// The data set.
        name: &'static str,
        /// Why.
        source: RiskError,
    },
    /// A result cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Every figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Seed that it all came from.
    pub seed: u64,
    /// One for each data set.
    pub sets: Vec<SetFigures>,
    /// The model of all ramps, for an edge.
    pub model: String,
    /// How long it took.
    pub seconds: f64,
}

/// One data set.
#[derive(Debug, Clone, Serialize)]
pub struct SetFigures {
    /// Its name.
    pub name: &'static str,
    /// Unit of its times.
    pub time_unit: &'static str,
    /// Rows, units and features.
    pub rows: usize,
    /// See `rows`.
    pub units: usize,
    /// See `rows`.
    pub features: usize,
    /// One for each partition.
    pub partitions: Vec<Assessment>,
}

/// Judges everything and writes `risk.json` and `ramps-model.json`. On a terminal a bar on standard error shows how far it is.
///
/// # Errors
/// [`RiskRunError`].
pub fn run(args: &Args) -> Result<Figures, RiskRunError> {
    let started = Instant::now();
    let write = |path: &Path, source| RiskRunError::Write {
        path: path.to_owned(),
        source,
    };
    std::fs::create_dir_all(&args.out).map_err(|error| write(&args.out, error))?;
    let mut sets = Vec::new();
    if let Some(data) = &args.data {
        sets.push(judge(&engines::load(data)?, args)?);
        sets.push(judge(&drives::load(data)?, args)?);
    }
    let ramps = ramps::make(args.seed, args.lives)?;
    sets.push(judge(&ramps, args)?);
    let predictor = Predictor::fit(&ramps.settings, &ramps.set).map_err(|source| RiskRunError::Fit {
        name: ramps.name,
        source,
    })?;
    let path = args.out.join("ramps-model.json");
    predictor.save(&path).map_err(|error| write(&path, error))?;
    let figures = Figures {
        seed: args.seed,
        sets,
        model: predictor.version().to_string(),
        seconds: started.elapsed().as_secs_f64(),
    };
    let path = args.out.join("risk.json");
    let text = serde_json::to_vec_pretty(&figures).map_err(|error| write(&path, error.into()))?;
    std::fs::write(&path, text).map_err(|error| write(&path, error))?;
    Ok(figures)
}

fn judge(data: &Dataset, args: &Args) -> Result<SetFigures, RiskRunError> {
    let progress = Steps::new(
        format!("judging {}", data.name),
        args.partitions as usize * assess::FOLDS,
    );
    let mut partitions = Vec::new();
    for number in 0..u64::from(args.partitions) {
        let fold_of = assess::partition(&data.set, number, args.seed);
        let figures =
            assess::assess(data, &fold_of, &|| progress.step()).map_err(|source| RiskRunError::Fit {
                name: data.name,
                source,
            })?;
        partitions.push(figures);
    }
    let mut units = data.set.units().to_vec();
    units.sort_unstable();
    units.dedup();
    tracing::debug!(
        set = data.name,
        unit = data.unit_word,
        units = units.len(),
        "judged"
    );
    Ok(SetFigures {
        name: data.name,
        time_unit: data.time_unit,
        rows: data.set.len(),
        units: units.len(),
        features: data.set.width(),
        partitions,
    })
}

/// The tables for people: chances, then times.
pub fn table(figures: &Figures) -> String {
    let mut chances = Vec::new();
    let mut times = Vec::new();
    for set in &figures.sets {
        chance_rows(set, "hazard", |part| &part.horizons[..], &mut chances);
        times.push(time_row(set, "hazard", |part| (&part.times, part.abstained)));
        if set.partitions.iter().all(|part| part.fallback.is_some()) {
            let none: &[HorizonFigures] = &[];
            let horizons = move |part: &Assessment| -> Vec<HorizonFigures> {
                part.fallback.as_ref().map_or(none, |f| &f.horizons[..]).to_vec()
            };
            fallback_rows(set, horizons, &mut chances);
            times.push(time_row(set, "linear", |part| {
                part.fallback
                    .as_ref()
                    .map_or((&part.times, part.abstained), |f| (&f.times, f.abstained))
            }));
        }
    }
    let chances = output::table(
        &[
            "Set",
            "Model",
            "Within",
            "Rate",
            "AUC-ROC",
            "floor",
            "AUC-PR",
            "floor",
            "ECE",
            "ECE eq. mass",
            "Brier",
        ],
        &chances,
    );
    let times = output::table(
        &[
            "Set",
            "Model",
            "RMSE",
            "floor",
            "Coverage",
            "adaptive",
            "Width",
            "In sight",
            "Abstained",
            "foreign",
        ],
        &times,
    );
    format!(
        "Mean over partitions (least to most)\n\n{chances}\n{times}\nmodel {}, {:.0} s",
        figures.model, figures.seconds
    )
}

fn chance_rows<'a>(
    set: &'a SetFigures,
    model: &str,
    pick: impl Fn(&'a Assessment) -> &'a [HorizonFigures],
    rows: &mut Vec<Vec<String>>,
) {
    let parts: Vec<&[HorizonFigures]> = set.partitions.iter().map(pick).collect();
    push_chances(set, model, &parts, rows);
}

fn fallback_rows(
    set: &SetFigures,
    pick: impl Fn(&Assessment) -> Vec<HorizonFigures>,
    rows: &mut Vec<Vec<String>>,
) {
    let owned: Vec<Vec<HorizonFigures>> = set.partitions.iter().map(pick).collect();
    let parts: Vec<&[HorizonFigures]> = owned.iter().map(Vec::as_slice).collect();
    push_chances(set, "linear", &parts, rows);
}

fn push_chances(set: &SetFigures, model: &str, parts: &[&[HorizonFigures]], rows: &mut Vec<Vec<String>>) {
    for at in 0..parts.first().map_or(0, |part| part.len()) {
        let spread = |value: fn(&HorizonFigures) -> f64| spread(parts.iter().map(|part| value(&part[at])));
        rows.push(vec![
            set.name.to_owned(),
            model.to_owned(),
            format!("{} {}", parts[0][at].horizon, set.time_unit),
            format!("{:.4}", parts[0][at].rate),
            spread(|h| h.auc_roc),
            spread(|h| h.floor_auc_roc.unwrap_or(f64::NAN)),
            spread(|h| h.auc_pr),
            spread(|h| h.floor_auc_pr.unwrap_or(f64::NAN)),
            spread(|h| h.ece),
            spread(|h| h.ece_equal_mass),
            spread(|h| h.brier),
        ]);
    }
}

fn time_row<'a>(
    set: &'a SetFigures,
    model: &str,
    pick: impl Fn(&'a Assessment) -> (&'a TimeFigures, f64),
) -> Vec<String> {
    let parts: Vec<(&TimeFigures, f64)> = set.partitions.iter().map(pick).collect();
    let of = |value: fn(&TimeFigures) -> f64| spread(parts.iter().map(|part| value(part.0)));
    vec![
        set.name.to_owned(),
        model.to_owned(),
        of(|t| t.rmse),
        of(|t| t.floor_rmse.unwrap_or(f64::NAN)),
        of(|t| t.coverage),
        of(|t| t.coverage_adaptive),
        of(|t| t.width),
        of(|t| t.in_sight),
        spread(parts.iter().map(|part| part.1)),
        if model == "hazard" {
            spread(set.partitions.iter().map(|part| part.abstained_foreign))
        } else {
            "-".to_owned()
        },
    ]
}

/// `mean (least-most)`; `-` where there is nothing.
fn spread(values: impl Iterator<Item = f64>) -> String {
    let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    if values.is_empty() {
        return "-".to_owned();
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let digits = if most >= 10.0 { 1 } else { 3 };
    if most - least < 1e-9 {
        return format!("{mean:.digits$}");
    }
    format!("{mean:.digits$} ({least:.digits$}-{most:.digits$})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataset::Floor;

    fn recorded() -> Option<PathBuf> {
        let data = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data"));
        if data.join("cmapss").exists() {
            return Some(data.to_owned());
        }
        println!("left out: no recorded engines and drives in {}", data.display());
        None
    }

    /// 0.786 / 0.793 / 0.798 and 0.045 / 0.153 / 0.238: the published floors of drives.
    #[test]
    fn the_floor_of_drives_is_the_published_one() {
        let Some(data) = recorded() else { return };
        let drives = drives::load(&data).unwrap();
        assert_eq!((drives.set.len(), drives.set.width()), (35_975, 13));
        let Floor::Scores(scores) = &drives.floor else {
            panic!("drives have scores");
        };
        let published = [(0.786, 0.045), (0.793, 0.153), (0.798, 0.238)];
        for ((horizon, scores), floor) in drives.settings.horizons.iter().zip(scores).zip(published) {
            let failed = drives.set.outcomes().iter().map(|o| o.fails_before(*horizon));
            let rows: Vec<(f64, bool)> = scores.iter().copied().zip(failed).collect();
            let (roc, precision) = metric::areas(&rows);
            assert!(
                (roc - floor.0).abs() < 6e-4 && (precision - floor.1).abs() < 6e-4,
                "{horizon}: {roc} {precision}"
            );
        }
    }

    /// RMSE 19.7 with folds by unit number: the published floor of engines.
    #[test]
    fn the_floor_of_engines_is_the_published_one() {
        let Some(data) = recorded() else { return };
        let engines = engines::load(&data).unwrap();
        let Floor::RidgeTimes(rows) = &engines.floor else {
            panic!("engines have times");
        };
        let cap = 125.0;
        let mut squares = Vec::new();
        for fold in 0..5 {
            let test = rows.units_where(|unit| unit % 5 == fold);
            let times = floor::ridge_times(&rows.units_where(|unit| unit % 5 != fold), &test, cap);
            let errors = times.iter().zip(test.outcomes());
            squares.extend(errors.map(|(time, outcome)| (time - outcome.time().min(cap)).powi(2)));
        }
        assert_eq!(squares.len(), 20_631);
        let rmse = metric::mean(squares.into_iter()).sqrt();
        assert!((rmse - 19.7).abs() < 0.05, "{rmse}");
    }
}
