//! The results as CSV, Markdown and heat maps.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use plotters::prelude::*;
use serde::Serialize;

use super::RobustnessError;

/// One pipeline under one attack by one measure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    /// Screens and rule.
    pub pipeline: String,
    /// The attack, `none` for no hostile site.
    pub attack: String,
    /// What is measured.
    pub measure: Cow<'static, str>,
    /// Ratio to the honest-only oracle for each seed.
    pub ratios: Vec<f64>,
}

impl Entry {
    /// Mean over seeds.
    pub fn mean(&self) -> f64 {
        self.ratios.iter().sum::<f64>() / self.ratios.len().max(1) as f64
    }

    /// The worst seed: the largest share of harm, the least of everything else.
    pub fn worst(&self) -> f64 {
        let ratios = self.ratios.iter().copied();
        if less_is_better(&self.measure) {
            ratios.fold(f64::NEG_INFINITY, f64::max)
        } else {
            ratios.fold(f64::INFINITY, f64::min)
        }
    }

    /// Standard deviation over seeds.
    pub fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.ratios.iter().map(|ratio| (ratio - mean).powi(2)).sum();
        (squares / (self.ratios.len() as f64 - 1.0).max(1.0)).sqrt()
    }
}

/// Every entry on a line, after a header; the last field holds what each seed gave, in their order.
pub fn csv(entries: &[Entry]) -> String {
    let mut text = "pipeline,attack,measure,seeds,mean,worst,deviation,each\n".to_owned();
    for entry in entries {
        let each: Vec<String> = entry.ratios.iter().map(|ratio| format!("{ratio:.4}")).collect();
        // Writing to a string cannot fail.
        writeln!(
            text,
            "{},{},{},{},{:.4},{:.4},{:.4},{}",
            entry.pipeline,
            entry.attack,
            entry.measure,
            entry.ratios.len(),
            entry.mean(),
            entry.worst(),
            entry.deviation(),
            each.join(";")
        )
        .ok();
    }
    text
}

/// Whether a measure is a share of the new machines and no ratio.
fn is_share(measure: &str) -> bool {
    matches!(measure, "published" | "harmful" | "harmful_published")
}

/// Whether a measure is one of harm.
fn less_is_better(measure: &str) -> bool {
    matches!(measure, "harmful" | "harmful_published")
}

/// Names in the order in which they come.
fn in_order<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut found: Vec<&str> = Vec::new();
    for name in names {
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}

/// One table for each measure under what it says of where they come from: an attack a row, a pipeline a column, mean over seeds and worst seed.
pub fn markdown(entries: &[Entry], provenance: &str) -> String {
    let mut text = format!("{provenance}\n\n");
    for measure in in_order(entries.iter().map(|entry| entry.measure.as_ref())) {
        let (pipelines, attacks, cells) = grid(entries, measure);
        writeln!(text, "## {measure}\n\n| attack | {} |", pipelines.join(" | ")).ok();
        writeln!(text, "|---|{}", "---|".repeat(pipelines.len())).ok();
        let row = |name: &str, cell: &dyn Fn(&str) -> String| {
            let cells: Vec<String> = pipelines.iter().map(|pipeline| cell(pipeline)).collect();
            format!("| {name} | {} |\n", cells.join(" | "))
        };
        for attack in &attacks {
            text += &row(attack, &|pipeline| {
                cells.get(&(pipeline, attack)).map_or_else(
                    || "-".to_owned(),
                    |entry| format!("{:.3} ({:.3})", entry.mean(), entry.worst()),
                )
            });
        }
        if is_share(measure) {
            text.push('\n');
            continue;
        }
        text += &row("**worst attack**", &|pipeline| {
            let means = attacks
                .iter()
                .filter(|attack| **attack != super::NONE)
                .filter_map(|attack| cells.get(&(pipeline, attack)))
                .map(|entry| entry.mean());
            means
                .reduce(f64::min)
                .map_or_else(|| "-".to_owned(), |worst| format!("**{worst:.3}**"))
        });
        text.push('\n');
    }
    text
}

type Grid<'a> = (
    Vec<&'a str>,
    Vec<&'a str>,
    BTreeMap<(&'a str, &'a str), &'a Entry>,
);

fn grid<'a>(entries: &'a [Entry], measure: &str) -> Grid<'a> {
    let of: Vec<&Entry> = entries.iter().filter(|entry| entry.measure == measure).collect();
    let cells = of
        .iter()
        .map(|entry| ((entry.pipeline.as_str(), entry.attack.as_str()), *entry))
        .collect();
    (
        in_order(of.iter().map(|entry| entry.pipeline.as_str())),
        in_order(of.iter().map(|entry| entry.attack.as_str())),
        cells,
    )
}

const CELL: (i32, i32) = (132, 18);
const LEFT: i32 = 210;
const TOP: i32 = 54;

/// Draws one measure: means over seeds, from red (0.5 of the oracle and less) to green (as good as the oracle).
///
/// # Errors
/// [`RobustnessError::Draw`]
pub fn heat_map(path: &Path, entries: &[Entry], measure: &str) -> Result<(), RobustnessError> {
    let (pipelines, attacks, cells) = grid(entries, measure);
    let length = |count: usize, unit: i32| i32::try_from(count).unwrap_or(1_000) * unit;
    let width = LEFT + length(pipelines.len(), CELL.0) + 10;
    let height = TOP + length(attacks.len(), CELL.1) + 10;
    let draw = || -> Result<(), Box<dyn std::error::Error>> {
        let size = (u32::try_from(width)?, u32::try_from(height)?);
        let root = SVGBackend::new(path, size).into_drawing_area();
        root.fill(&WHITE)?;
        let font = ("sans-serif", 11);
        let title = if is_share(measure) {
            format!("{measure}: share of the new machines, mean over seeds")
        } else {
            format!("{measure}: ratio to the honest-only oracle, mean over seeds; red 0.5 and less, green 1")
        };
        root.draw(&Text::new(title, (8, 8), ("sans-serif", 14)))?;
        for (column, pipeline) in (0..).zip(&pipelines) {
            let place = (LEFT + column * CELL.0 + 3, TOP - 16);
            root.draw(&Text::new((*pipeline).to_owned(), place, font))?;
        }
        for (row, attack) in (0..).zip(&attacks) {
            let y = TOP + row * CELL.1;
            root.draw(&Text::new((*attack).to_owned(), (8, y + 4), font))?;
            for (column, pipeline) in (0..).zip(&pipelines) {
                let Some(entry) = cells.get(&(*pipeline, *attack)) else {
                    continue;
                };
                let x = LEFT + column * CELL.0;
                let corners = [(x, y), (x + CELL.0 - 2, y + CELL.1 - 2)];
                let good = if less_is_better(measure) {
                    1.0 - entry.mean()
                } else {
                    entry.mean()
                };
                root.draw(&Rectangle::new(corners, colour(good).filled()))?;
                root.draw(&Text::new(format!("{:.3}", entry.mean()), (x + 48, y + 4), font))?;
            }
        }
        root.present()?;
        Ok(())
    };
    draw().map_err(|error| RobustnessError::Draw(error.to_string()))
}

/// Red at 0.5, yellow at 0.8, green at 1.
fn colour(ratio: f64) -> RGBColor {
    let share = ((ratio - 0.5) / 0.5).clamp(0.0, 1.0);
    let mix = |from: f64, to: f64, share: f64| {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a colour between 0 and 255"
        )]
        let value = (from + (to - from) * share).round().clamp(0.0, 255.0) as u8;
        value
    };
    let (red, yellow, green) = ([224.0, 102.0, 92.0], [250.0, 222.0, 130.0], [126.0, 200.0, 132.0]);
    let (from, to, share) = if share < 0.6 {
        (red, yellow, share / 0.6)
    } else {
        (yellow, green, (share - 0.6) / 0.4)
    };
    RGBColor(
        mix(from[0], to[0], share),
        mix(from[1], to[1], share),
        mix(from[2], to[2], share),
    )
}

/// Writes `robustness.csv`, `robustness.md` and a heat map for each measure into `out`.
///
/// # Errors
/// [`RobustnessError`]
pub fn write(out: &Path, entries: &[Entry], provenance: &str) -> Result<(), RobustnessError> {
    let write = |name: &str, text: String| {
        let path = out.join(name);
        fs::write(&path, text).map_err(|source| RobustnessError::Write { path, source })
    };
    fs::create_dir_all(out).map_err(|source| RobustnessError::Write {
        path: out.to_owned(),
        source,
    })?;
    write("robustness.csv", csv(entries))?;
    write("robustness.md", markdown(entries, provenance))?;
    for measure in in_order(entries.iter().map(|entry| entry.measure.as_ref())) {
        heat_map(&out.join(format!("{measure}.svg")), entries, measure)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_hold_mean_and_worst_seed() {
        let entry = |pipeline: &str, attack: &str, ratios: &[f64]| Entry {
            pipeline: pipeline.to_owned(),
            attack: attack.to_owned(),
            measure: "loss".into(),
            ratios: ratios.to_vec(),
        };
        let entries = [
            entry("mean", "none", &[1.0, 1.0]),
            entry("mean", "ipm-1", &[0.5, 0.7]),
            entry("caf", "none", &[0.98, 1.0]),
        ];
        assert!(csv(&entries).contains("mean,ipm-1,loss,2,0.6000,0.5000,0.1414,0.5000;0.7000\n"));
        let markdown = markdown(&entries, "from here");
        assert!(markdown.contains("| ipm-1 | 0.600 (0.500) | - |"), "{markdown}");
        assert!(
            markdown.contains("| **worst attack** | **0.600** | - |"),
            "{markdown}"
        );
        // One bad seed of five must not hide where less is better.
        for (measure, worst) in [("harmful_published", 0.31), ("harmful", 0.31), ("published", 0.0)] {
            let entry = Entry {
                measure: measure.into(),
                ..entry("caf", "drift", &[0.0, 0.0, 0.31, 0.0, 0.0])
            };
            assert!(
                (entry.worst() - worst).abs() < 1e-12,
                "{measure}: {}",
                entry.worst()
            );
        }
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &entries, "from here").unwrap();
        let svg = fs::read_to_string(dir.path().join("loss.svg")).unwrap();
        assert!(svg.contains("ipm-1") && svg.contains("0.600"), "{svg}");
    }
}
