//! The experiment: learn, score every site's test part, write everything down.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;
use theriac_command::progress::{self, Steps};
use theriac_model::detector::{
    Detector, DetectorError, FitOptions, ModelFileError, Provenance, WARM_UP_ROWS,
};
use theriac_model::global::{GlobalError, GlobalModel, OwnLagWeights};
use theriac_model::gradient::Descent;
use theriac_model::io::{write_npy_f32, write_npy_u8};
use theriac_model::moments;
use theriac_model::ridge::LAMBDA_PRIOR;
use theriac_model::series::Series;
use theriac_model::threshold::{AlarmState, Verdict};
use theriac_protocol::message::GateVerdict;
use theriac_protocol::units::{Delta, NodeId, UnitError};

use super::args::{Args, ArgsError, Mode, Recipe, Settings};
use super::center::{Center, verdict_word};
use super::data::{DataError, Fleet, Site, load, pooled, pooled_linear};
use super::federation::{self, FederationError, Outcome, Settled};
use super::member::{Member, MemberError};
use super::summary::{FederationReport, SiteReport, summary};
use super::validator::Validator;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SimulateError {
    /// The command line makes no sense.
    #[error(transparent)]
    Args(#[from] ArgsError),
    /// There is nothing to train on.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A site cannot be fitted or scored.
    #[error("site `{site}`: {source}")]
    Detector {
        /// Which.
        site: NodeId,
        /// Why.
        source: DetectorError,
    },
    /// A site cannot take part.
    #[error("site `{site}`: {source}")]
    Member {
        /// Which.
        site: NodeId,
        /// Why.
        source: MemberError,
    },
    /// The rounds cannot go on.
    #[error(transparent)]
    Federation(#[from] FederationError),
    /// A model cannot be written.
    #[error(transparent)]
    Model(#[from] ModelFileError),
    /// The pooled rows give no model.
    #[error(transparent)]
    Global(#[from] GlobalError),
    /// A number is out of range.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// The disk said no.
    #[error("cannot write {path}: {source}")]
    Write {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No threads.
    #[error("cannot start threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// What came of a simulation.
#[derive(Debug)]
pub struct Simulated {
    /// What `summary.json` holds.
    pub summary: serde_json::Value,
    /// Each site.
    pub sites: BTreeMap<NodeId, SiteReport>,
}

impl Simulated {
    /// What people are told: the sites, rounds, privacy, gates, and who was caught at what.
    pub fn table(&self) -> String {
        super::words::words(&self.summary, &self.sites)
    }
}

/// Runs the simulation. On a terminal a bar on standard error shows how far it is.
///
/// # Errors
/// [`SimulateError`]; files written until then stay.
pub fn run(args: Args) -> Result<Simulated, SimulateError> {
    let settings = Settings::check(args)?;
    let mut pool = rayon::ThreadPoolBuilder::new();
    if let Some(threads) = settings.args.threads {
        pool = pool.num_threads(threads.get());
    }
    pool.build()?.install(|| simulate(&settings))
}

fn simulate(settings: &Settings) -> Result<Simulated, SimulateError> {
    let started = Instant::now();
    let fleet = load(&settings.args.data, &settings.args.sites)?;
    let known = |name: &&NodeId| fleet.sites.iter().any(|site| site.name == **name);
    if let Some(name) = settings.args.validators.iter().find(|name| !known(name)) {
        return Err(ArgsError::NoSuchValidator(name.clone()).into());
    }
    settings.check_sites(fleet.sites.len().saturating_sub(settings.args.validators.len()))?;
    // One run for each number of rows of a cold start; one without any.
    let starts: Vec<Option<usize>> = match &settings.args.cold_start[..] {
        [] => vec![None],
        rows => rows.iter().copied().map(Some).collect(),
    };
    let parts: Vec<(Settings, Directories)> = starts
        .iter()
        .map(|start| {
            let root = match start {
                Some(rows) if starts.len() > 1 => settings.args.out.join(format!("cold-{rows}")),
                _ => settings.args.out.clone(),
            };
            let part = Settings {
                args: settings.args.with_cold_start(*start),
                ..settings.clone()
            };
            Ok((part, Directories::create(&root)?))
        })
        .collect::<Result<_, SimulateError>>()?;
    let progress = Steps::new("sites scored", fleet.sites.len() * parts.len());
    let runs: Vec<Run<'_>> = parts
        .iter()
        .map(|(settings, out)| Run {
            settings,
            fleet: &fleet,
            out,
            progress: &progress,
        })
        .collect();
    let results = match (settings.args.mode, settings.args.cold_start.is_empty()) {
        (Mode::Local | Mode::Constant, _) => runs
            .iter()
            .map(|run| Ok((run.alone()?, Vec::new())))
            .collect::<Result<Vec<_>, SimulateError>>()?,
        (Mode::Central, _) => runs
            .iter()
            .map(|run| Ok((run.central()?, Vec::new())))
            .collect::<Result<_, SimulateError>>()?,
        (Mode::Federated, true) => runs.iter().map(Run::together).collect::<Result<_, _>>()?,
        (Mode::Federated, false) => newcomers(&runs)?,
    };
    let mut written = Vec::new();
    for (run, (sites, federations)) in runs.iter().zip(results) {
        written.push(run.write(sites, &federations, started)?);
    }
    // Several: a table of the last, all files of each.
    written.pop().ok_or(SimulateError::Data(DataError::NoSites {
        path: settings.args.data.clone(),
    }))
}

type Sites = BTreeMap<NodeId, SiteReport>;

/// Each site in turn is new and meets the model of the others: once for each number of rows that it may have.
fn newcomers<'a>(runs: &[Run<'a>]) -> Result<Vec<(Sites, Vec<FederationReport>)>, SimulateError> {
    let Some(first) = runs.first() else {
        return Ok(Vec::new());
    };
    let fleet = first.fleet;
    first.warm_up();
    let one = |site: &'a Site| {
        let hostile = first.hostile(Some(&site.name));
        let (center, members) = first.members(Some(&site.name), &hostile)?;
        let mut newcomers = Vec::new();
        for run in runs {
            let mut newcomer = run.member(site, &center, &site.name)?;
            newcomer.detector = Some(run.local(site)?);
            newcomers.push(newcomer);
        }
        let outcome = federation::run(center, members, newcomers, first.settings, &fleet.schema)?;
        let mut scored = Vec::new();
        for (run, settled) in runs.iter().zip(&outcome.newcomers) {
            let report = report(&outcome, Some(&site.name), hostile.clone());
            scored.push((run.score_member(site, Some(settled), &outcome)?, report));
        }
        Ok((site.name.clone(), scored))
    };
    let all: Vec<_> = fleet
        .sites
        .par_iter()
        .map(one)
        .collect::<Result<_, SimulateError>>()?;
    let mut results: Vec<(Sites, Vec<FederationReport>)> =
        runs.iter().map(|_| (BTreeMap::new(), Vec::new())).collect();
    for (name, scored) in all {
        for ((sites, reports), (site, report)) in results.iter_mut().zip(scored) {
            sites.insert(name.clone(), site);
            reports.push(report);
        }
    }
    Ok(results)
}

struct Run<'a> {
    settings: &'a Settings,
    fleet: &'a Fleet,
    out: &'a Directories,
    progress: &'a Steps,
}

impl<'a> Run<'a> {
    /// Writes the summary and the rounds.
    fn write(
        &self,
        sites: Sites,
        federations: &[FederationReport],
        started: Instant,
    ) -> Result<Simulated, SimulateError> {
        let (settings, fleet, out) = (self.settings, self.fleet, self.out);
        let parameters = GlobalModel::initial(fleet.schema.channels(), settings.args.seed)
            .values()
            .len();
        let summary = summary(
            settings,
            &sites,
            federations,
            parameters,
            started.elapsed().as_secs_f64(),
        );
        write_rounds(&out.root.join("rounds.jsonl"), federations)?;
        let path = out.root.join("summary.json");
        let text = format!("{summary:#}\n");
        fs::write(&path, text).map_err(|source| SimulateError::Write { path, source })?;
        Ok(Simulated { summary, sites })
    }

    /// What is made once and read by every federation.
    fn warm_up(&self) {
        let schema = &self.fleet.schema;
        let sites = self.fleet.sites.par_iter();
        match self.settings.args.recipe {
            Recipe::Moments if self.settings.terms.is_none_or(|terms| terms.windows.is_none()) => {
                sites.for_each(|site| _ = site.blocks(schema));
            }
            Recipe::Gradient => sites.for_each(|site| _ = site.block_rows(schema)),
            Recipe::Moments | Recipe::Delta => {}
        }
    }

    /// Every site from its own rows.
    fn alone(&self) -> Result<Sites, SimulateError> {
        let one = |site: &Site| self.score(site, &self.local(site)?.0, None, None);
        self.each_site(one)
    }

    /// Every site with the model of all rows in one place; in a cold start without its own.
    fn central(&self) -> Result<Sites, SimulateError> {
        let schema = &self.fleet.schema;
        let channels = schema.channels();
        let model = |without: Option<&NodeId>| {
            let sites = self.fleet.sites.iter().filter(|site| Some(&site.name) != without);
            if self.settings.args.recipe == Recipe::Gradient {
                let initial = GlobalModel::initial(channels, self.settings.args.seed);
                return match pooled_linear(sites, schema, LAMBDA_PRIOR) {
                    Some(weights) => initial.with_descent(&Descent::begin(weights)),
                    None => Err(GlobalError::NonFinite { index: 0 }),
                };
            }
            let weights = moments::solve(&pooled(sites, schema), 1, 0.0, moments::BLOCK_CLIP_NORM, channels);
            GlobalModel::initial(channels, self.settings.args.seed).with_own_lag(&weights)
        };
        self.fleet
            .sites
            .par_iter()
            .for_each(|site| match self.settings.args.recipe {
                Recipe::Gradient => _ = site.equations(schema),
                Recipe::Moments | Recipe::Delta => _ = site.blocks(schema),
            });
        let cold = !self.settings.args.cold_start.is_empty();
        if !cold {
            self.save_global(&model(None)?, &Provenance::default())?;
        }
        let one = |site: &Site| {
            let (local, rows) = self.local(site)?;
            let model = model(cold.then_some(&site.name))?;
            let fitted = local
                .refit_with_global(&rows, &model, local.options())
                .map_err(|source| failed(site, source))?;
            self.score(site, &fitted, None, None)
        };
        self.each_site(one)
    }

    /// All sites in one federation.
    fn together(&self) -> Result<(Sites, Vec<FederationReport>), SimulateError> {
        let locals: Vec<_> = self
            .fleet
            .sites
            .par_iter()
            .map(|site| self.local(site))
            .collect::<Result<_, _>>()?;
        let hostile = self.hostile(None);
        let (center, mut members) = self.members(None, &hostile)?;
        let takes_part = self.fleet.sites.iter().zip(locals);
        let takes_part = takes_part.filter(|(site, _)| !self.validates(&site.name));
        for (member, (_, local)) in members.iter_mut().zip(takes_part) {
            member.detector = Some(local);
        }
        let outcome = progress::during(format!("rounds among {} sites", members.len()), || {
            federation::run(center, members, Vec::new(), self.settings, &self.fleet.schema)
        })?;
        self.save_global(&outcome.model, &provenance(&outcome, None, self.settings))?;
        let report = report(&outcome, None, hostile);
        let sites =
            self.each_site(|site| self.score_member(site, outcome.sites.get(&site.name), &outcome))?;
        Ok((sites, vec![report]))
    }

    /// The detector that a site has without any model of others, and the rows that it has. With a whole history it stands on its
    /// own; at a cold start it leans on the public constant, the strongest that a lone site can do.
    fn local(&self, site: &Site) -> Result<(Detector, Arc<Series>), SimulateError> {
        let constant = OwnLagWeights::public_constant(self.fleet.schema.channels());
        let (rows, prior) = match self.settings.args.cold_start.first() {
            Some(rows) => (site.train.tail(*rows), Some(constant)),
            None if self.settings.args.mode == Mode::Constant => (site.train.clone(), Some(constant)),
            None => (site.train.clone(), None),
        };
        let options = FitOptions {
            prior,
            ..FitOptions::new(self.settings.step)
        };
        let schema = &self.fleet.schema;
        let detector = match self.settings.args.mode {
            Mode::Constant => Detector::fit_as_is(schema, &rows, &options),
            Mode::Federated | Mode::Local | Mode::Central => Detector::fit(schema, &rows, &options),
        };
        Ok((detector.map_err(|source| failed(site, source))?, Arc::new(rows)))
    }

    /// The first sites by name that are not new.
    fn hostile(&self, newcomer: Option<&NodeId>) -> BTreeSet<NodeId> {
        let count = self.settings.malicious.map_or(0, |(count, _)| count);
        let names = self.fleet.sites.iter().map(|site| &site.name);
        names
            .filter(|name| Some(*name) != newcomer && !self.validates(name))
            .take(count)
            .cloned()
            .collect()
    }

    fn validates(&self, name: &NodeId) -> bool {
        self.settings.args.validators.contains(name)
    }

    fn members(
        &self,
        newcomer: Option<&NodeId>,
        hostile: &BTreeSet<NodeId>,
    ) -> Result<(Center, Vec<Member<'a>>), SimulateError> {
        let sites: Vec<&Site> = self
            .fleet
            .sites
            .iter()
            .filter(|site| Some(&site.name) != newcomer && !self.validates(&site.name))
            .collect();
        let validators = self.fleet.sites.iter();
        let validators = validators.filter(|site| Some(&site.name) != newcomer && self.validates(&site.name));
        let validators = validators
            .map(|site| Validator::new(site, &self.fleet.schema, self.settings.step))
            .collect();
        let block_rows = self
            .settings
            .terms
            .map_or(moments::BLOCK_ROWS, |terms| terms.block_rows);
        let longest = sites
            .iter()
            .map(|site| site.train.rows() / block_rows)
            .max()
            .unwrap_or(0);
        let longest = u32::try_from(longest).unwrap_or(u32::MAX).max(1);
        let blocks_max = self.settings.args.round_blocks.unwrap_or(longest).min(longest);
        let center = Center::new(
            self.settings,
            self.fleet.schema.channels(),
            sites.len(),
            blocks_max,
        )?
        .with_validators(validators);
        let place = newcomer.map_or("all", NodeId::as_str);
        let place = NodeId::new(place)?;
        let mut members = Vec::new();
        for site in sites {
            let mut member = self.member(site, &center, &place)?;
            if let Some((_, attack)) = self.settings.malicious.filter(|_| hostile.contains(&site.name)) {
                member.attack = Some(attack);
            }
            members.push(member);
        }
        Ok((center, members))
    }

    fn member(&self, site: &'a Site, center: &Center, place: &NodeId) -> Result<Member<'a>, SimulateError> {
        let dir = self.out.ledgers.join(place.as_str());
        Member::new(
            site,
            self.settings,
            self.fleet.schema.channels(),
            center.base(),
            &dir,
        )
        .map_err(|source| SimulateError::Member {
            site: site.name.clone(),
            source,
        })
    }

    fn each_site(
        &self,
        one: impl Fn(&'a Site) -> Result<SiteReport, SimulateError> + Sync,
    ) -> Result<Sites, SimulateError> {
        self.fleet
            .sites
            .par_iter()
            .map(|site| Ok((site.name.clone(), one(site)?)))
            .collect()
    }

    fn score_member(
        &self,
        site: &Site,
        settled: Option<&Settled>,
        outcome: &Outcome,
    ) -> Result<SiteReport, SimulateError> {
        let Some((settled, detector)) =
            settled.and_then(|settled| settled.detector.as_ref().map(|d| (settled, d)))
        else {
            return self.score(site, &self.local(site)?.0, None, None);
        };
        let mut detector = detector.clone();
        if settled.verdict == Some(GateVerdict::Accepted) {
            detector.set_provenance(provenance(outcome, settled.epsilon, self.settings));
        }
        let scored = self.score(site, &detector, settled.verdict, Some(outcome))?;
        let report = SiteReport {
            gate_reason: settled.reason.clone(),
            ..scored
        };
        let delta = settled
            .epsilon
            .and(self.settings.terms)
            .map(|terms| terms.delta.value());
        Ok(SiteReport {
            epsilon: settled.epsilon,
            delta,
            ..report
        })
    }

    /// Scores a site's test part and writes what came of it.
    fn score(
        &self,
        site: &Site,
        detector: &Detector,
        verdict: Option<GateVerdict>,
        outcome: Option<&Outcome>,
    ) -> Result<SiteReport, SimulateError> {
        let (scores, causes) = detector
            .explain_series(&site.test)
            .map_err(|source| failed(site, source))?;
        let (alarms, raised) = alarms(detector, &scores);
        let name = site.name.as_str();
        let (rows, channels) = (site.test.rows(), site.test.channels());
        let file = |dir: &Path| dir.join(format!("{name}.npy"));
        let written = |path: PathBuf, result: io::Result<()>| {
            result.map_err(|source| SimulateError::Write { path, source })
        };
        let path = file(&self.out.scores);
        written(path.clone(), write_npy_f32(&path, &[rows], &scores))?;
        let path = file(&self.out.alarms);
        written(path.clone(), write_npy_u8(&path, &[rows], &alarms))?;
        let path = file(&self.out.causes);
        written(path.clone(), write_npy_f32(&path, &[rows, channels], &causes))?;
        detector.save(&self.out.model, name)?;

        let days = rows as f64 * self.settings.step.as_secs_f64() / 86_400.0;
        let mean = |bytes: fn(&federation::Traffic) -> u64| {
            let traffic = outcome?
                .traffic
                .iter()
                .filter(|((_, node), _)| *node == site.name);
            let bytes: Vec<f64> = traffic.map(|(_, traffic)| bytes(traffic) as f64).collect();
            (!bytes.is_empty()).then(|| bytes.iter().sum::<f64>() / bytes.len() as f64)
        };
        let gate = verdict.map(verdict_word);
        self.progress.step();
        Ok(SiteReport {
            train_rows: usize::try_from(detector.rows()).unwrap_or(usize::MAX),
            test_rows: rows,
            alarms: raised,
            alarms_per_day: if days > 0.0 { raised as f64 / days } else { 0.0 },
            gate,
            gate_reason: None,
            epsilon: None,
            delta: None,
            bytes_up_per_round: mean(|traffic| traffic.up),
            bytes_down_per_round: mean(|traffic| traffic.down),
        })
    }

    fn save_global(&self, model: &GlobalModel, provenance: &Provenance) -> Result<(), SimulateError> {
        Ok(model.save(&self.out.model, "global", &self.fleet.schema, provenance)?)
    }
}

fn failed(site: &Site, source: DetectorError) -> SimulateError {
    SimulateError::Detector {
        site: site.name.clone(),
        source,
    }
}

/// Which rows belong to an alarm, and how many alarms there were, as an edge that starts with the test part would say.
fn alarms(detector: &Detector, scores: &[f32]) -> (Vec<u8>, u64) {
    let mut state = AlarmState::new(detector.threshold());
    let mut raised = 0;
    let alarms = scores.iter().enumerate().map(|(row, score)| {
        let verdict = state.push(if row < WARM_UP_ROWS { f32::NAN } else { *score });
        raised += u64::from(verdict == Verdict::Raised);
        u8::from(verdict.alarmed())
    });
    (alarms.collect(), raised)
}

fn provenance(outcome: &Outcome, epsilon: Option<f64>, settings: &Settings) -> Provenance {
    let header = &outcome.header;
    let delta = settings
        .terms
        .filter(|_| epsilon.is_some())
        .map(|terms| Delta::value(terms.delta));
    Provenance {
        model_digest: header.payload_digest.to_string(),
        model_version: header.version.0,
        round: header.round.0,
        rule: header.rule.clone(),
        epsilon,
        delta,
        training_sites: header.contributors.into(),
    }
}

fn report(outcome: &Outcome, newcomer: Option<&NodeId>, hostile: BTreeSet<NodeId>) -> FederationReport {
    FederationReport {
        newcomer: newcomer.cloned(),
        records: outcome.records.clone(),
        traffic: outcome.traffic.clone(),
        epsilon: outcome
            .sites
            .iter()
            .map(|(node, settled)| (node.clone(), settled.epsilon))
            .collect(),
        hostile,
    }
}

fn write_rounds(path: &Path, federations: &[FederationReport]) -> Result<(), SimulateError> {
    let write = || {
        let mut file = BufWriter::new(File::create(path)?);
        for line in federations.iter().flat_map(FederationReport::lines) {
            serde_json::to_writer(&mut file, &line)?;
            file.write_all(b"\n")?;
        }
        file.flush()
    };
    write().map_err(|source| SimulateError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Where results go.
#[derive(Debug)]
struct Directories {
    root: PathBuf,
    scores: PathBuf,
    alarms: PathBuf,
    causes: PathBuf,
    model: PathBuf,
    /// One folder for each federation, one ledger for each of its sites. An earlier run's are other sites' and are removed.
    ledgers: PathBuf,
}

impl Directories {
    fn create(root: &Path) -> Result<Self, SimulateError> {
        let ledgers = root.join("ledgers");
        let directories = Self {
            root: root.to_owned(),
            scores: root.join("scores"),
            alarms: root.join("alarms"),
            causes: root.join("causes"),
            model: root.join("model"),
            ledgers,
        };
        let write = |path: &PathBuf, result: io::Result<()>| {
            result.map_err(|source| SimulateError::Write {
                path: path.clone(),
                source,
            })
        };
        if directories.ledgers.exists() {
            write(&directories.ledgers, fs::remove_dir_all(&directories.ledgers))?;
        }
        let Self {
            scores,
            alarms,
            causes,
            model,
            ..
        } = &directories;
        for path in [scores, alarms, causes, model] {
            write(path, fs::create_dir_all(path))?;
        }
        Ok(directories)
    }
}
