//! The command line of `theriac-lab simulate`, and the same once checked.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use theriac_aggregator::robust::{Options, RuleError, RuleName, rule};
use theriac_command::output::Format;
use theriac_model::detector::ROWS_MIN;
use theriac_model::gradient::{GRADIENT_CLIP_NORM, JOB_ROUNDS};
use theriac_model::moments::{BLOCK_CLIP_NORM, BLOCK_ROWS};
use theriac_privacy::accountant::{SamplingRate, calibrated_noise_multiplier};
use theriac_privacy::policy::PrivacyUnit;
use theriac_privacy::windows::{BlockWindows, RecordWindows, WINDOW_DEFAULT, WindowsError};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Delta, Epsilon, L2Norm, NodeId, NoiseMultiplier, UnitError};

use crate::attack::Attack;

/// Clipping norm C of one weight change: near the norm of what twenty steps change on recorded servers.
pub const DELTA_CLIP_NORM: f64 = 1.0;

/// How sites learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Together, through rounds.
    Federated,
    /// Each from its own rows alone; in a cold start leaning on the public constant.
    Local,
    /// The public constant as it is: no weight is learnt.
    Constant,
    /// From everybody's rows in one place, without clipping, noise or rule: what plain federation aims at.
    Central,
}

/// What crosses sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Recipe {
    /// Moments of every channel's own lags and its level: each block is released once, the centre solves.
    Moments,
    /// Gradients of the full linear model, clipped block by block, of the same blocks in every round; the centre steps.
    Gradient,
    /// Weight changes of the residual network after a few local gradient steps, in every round, of all rows of a site.
    Delta,
}

impl Recipe {
    /// The kind of its updates.
    pub fn kind(self) -> UpdateKind {
        match self {
            Self::Moments => UpdateKind::Moments,
            Self::Gradient => UpdateKind::Gradient,
            Self::Delta => UpdateKind::Delta,
        }
    }
}

/// What the noise of a site's updates hides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Privacy {
    /// Nothing: no noise. For measurement; no edge can do this.
    Off,
    /// One row of metrics: blocks of 60 rows are cut into windows, each clipped on its own.
    Record,
    /// Everything within one block of 60 rows.
    Block,
}

/// Trains on recorded metrics, many sites in parallel, and scores their test parts.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Directory with NAME.train.npy.gz and NAME.test.npy.gz, float32 [time, channel]; every NAME is a site.
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// Directory for scores/, alarms/, causes/, model/, rounds.jsonl and summary.json; what is there is replaced.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Which sites, separated by commas [default: all].
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    pub sites: Vec<String>,
    /// Rounds. Of moments each releases its own part of the history, so every block is charged once; of gradients and deltas each reads all
    /// again and is charged again [default: 20 of gradients, else 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Blocks that a site releases in one round of moments, of its newest `--rounds` times as many [default: all that there are, in equal parts].
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub round_blocks: Option<u32>,
    /// Whether releases of earlier rounds of moments count beside those of the last one, as `rounds.accumulate` of an aggregator.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub accumulate: bool,
    /// Most releases of a site that count, as `rounds.moments_keep`.
    #[arg(long, value_name = "N", default_value_t = 150, value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub moments_keep: u32,
    /// Seed of nonces, rounding and initial weights. Privacy noise is never seeded.
    #[arg(long, value_name = "S", default_value_t = 1)]
    pub seed: u64,
    /// Threads [default: one for each processor].
    #[arg(long, value_name = "T")]
    pub threads: Option<NonZeroUsize>,
    /// How sites learn.
    #[arg(long, value_enum, default_value_t = Mode::Federated)]
    pub mode: Mode,
    /// What crosses sites.
    #[arg(long, value_enum, default_value_t = Recipe::Moments)]
    pub recipe: Recipe,
    /// Steps that a site takes in one round: of 256 rows each for deltas [default: 20]; of all rows for gradients [default: 1], where more need
    /// `--privacy off`.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub local_steps: Option<u32>,
    /// Pull of a site's local steps back to the model that the round began with (FedProx); only with gradients and `--local-steps`.
    #[arg(long, value_name = "MU", default_value_t = 0.0)]
    pub proximal: f32,
    /// How far the model moves towards the sites' mean in one round of gradients or deltas. Below 1 this is Reptile.
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub server_rate: f32,
    /// Share of the last move that is added to the next [default: 0.8 for gradients, else 0].
    #[arg(long, value_name = "M")]
    pub server_momentum: Option<f32>,
    /// Each site in turn is new: its last K train rows only, and the model of the others. Several K, separated by commas, meet the same model; the
    /// results of each lie in a folder `cold-K`.
    #[arg(long, value_name = "K", value_delimiter = ',')]
    pub cold_start: Vec<usize>,
    /// What the noise of a site's updates hides.
    #[arg(long, value_enum, default_value_t = Privacy::Block)]
    pub privacy: Privacy,
    /// Rows of one window with `--privacy record`, 11 to 60, as `record_window` of a policy [default: 60].
    #[arg(long, value_name = "W")]
    pub record_window: Option<u32>,
    /// Rows from the beginning of one window to that of the next, as `record_stride` of a policy [default: `--record-window`].
    #[arg(long, value_name = "S")]
    pub record_stride: Option<u32>,
    /// Each site's ε over the whole run.
    #[arg(long, value_name = "E", default_value_t = 4.0)]
    pub epsilon: f64,
    /// Each site's δ.
    #[arg(long, value_name = "D", default_value_t = 1e-6)]
    pub delta: f64,
    /// How the aggregator combines updates, as `rounds.rule` of its configuration: `caf`, `nnm+trimmed_mean`, `mean` and so on.
    #[arg(long, value_name = "NAME", default_value_t = RuleName::CAF)]
    pub rule: RuleName,
    /// Hostile sites that the rule withstands [default: as many as there are].
    #[arg(long, value_name = "F")]
    pub byzantine: Option<usize>,
    /// What hostile sites do; `theriac-lab attack list` shows all.
    #[arg(long, value_name = "NAME", requires = "malicious")]
    pub attack: Option<Attack>,
    /// The first K sites by name are hostile.
    #[arg(long, value_name = "K", requires = "attack")]
    pub malicious: Option<usize>,
    /// Sites that take part in no round and try each model on their own rows before it is published, separated by commas; one that is worse there is not [default: none].
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub validators: Vec<NodeId>,
    /// Time between two rows, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub step: u32,
    /// `human`, or `json` for the summary on standard output.
    #[arg(long, default_value = "human")]
    pub format: Format,
}

impl Args {
    /// Rounds, or as many as the recipe usually has.
    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(match self.recipe {
            Recipe::Gradient => JOB_ROUNDS,
            Recipe::Moments | Recipe::Delta => 1,
        })
    }

    /// Share of the last move that is added to the next.
    pub fn server_momentum(&self) -> f32 {
        self.server_momentum.unwrap_or(match self.recipe {
            Recipe::Gradient => 0.8,
            Recipe::Moments | Recipe::Delta => 0.0,
        })
    }

    /// Steps of one round of deltas.
    pub fn delta_steps(&self) -> usize {
        self.local_steps.map_or(20, |steps| steps as usize)
    }

    /// The same with one number of rows for a cold start, or none.
    #[must_use]
    pub fn with_cold_start(&self, rows: Option<usize>) -> Self {
        Self {
            cold_start: rows.into_iter().collect(),
            ..self.clone()
        }
    }
}

/// Why the command line cannot be carried out.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ArgsError {
    /// A number is out of range.
    #[error("--{0}")]
    Unit(UnitError),
    /// A step of the centre that leads nowhere or away.
    #[error("--{name} must be {range}, got {got}")]
    Server {
        /// Which argument.
        name: &'static str,
        /// What it may be.
        range: &'static str,
        /// What was given.
        got: f32,
    },
    /// Local steps that no guarantee covers.
    #[error(
        "--{0} of gradients need --recipe gradient and --privacy off: no clipping bounds what one block does to them"
    )]
    LocalSteps(&'static str),
    /// A network is not trained in one place.
    #[error("--mode central pools rows for moments and gradients: --recipe delta has no such form")]
    CentralDelta,
    /// Too few rows to fit on.
    #[error("--cold-start must be at least {ROWS_MIN}, got {0}")]
    ColdStart(usize),
    /// Windows that hold nothing, or that no block holds.
    #[error("--record-window and --record-stride: {0}")]
    Windows(WindowsError),
    /// Blocks of rounds that read all.
    #[error("--round-blocks needs --recipe moments: each round of the others reads all blocks again")]
    RoundBlocks,
    /// Windows of nothing.
    #[error(
        "--record-window and --record-stride need --privacy record and a recipe of blocks: nothing is cut into windows otherwise"
    )]
    NothingCut,
    /// No noise is strong enough.
    #[error("no noise reaches --epsilon {epsilon} at --delta {delta}: ask for a larger epsilon")]
    NoNoise {
        /// What was asked.
        epsilon: f64,
        /// What was asked.
        delta: f64,
    },
    /// Too many hostile sites.
    #[error("--malicious {malicious}: of {sites} sites at most {} can be hostile", sites.saturating_sub(1))]
    TooManyMalicious {
        /// What was asked.
        malicious: usize,
        /// Sites of one federation.
        sites: usize,
    },
    /// The rule needs more sites.
    #[error("--byzantine {byzantine}: {sites} sites in a federation withstand at most {}", (sites.saturating_sub(1)) / 2)]
    TooManyByzantine {
        /// What was asked.
        byzantine: usize,
        /// Sites of one federation.
        sites: usize,
    },
    /// The rule cannot hold, or needs a number that no option gives.
    #[error("--rule: {0}")]
    Rule(#[from] RuleError),
    /// Nobody publishes anything.
    #[error("--validators: nothing is published in --mode {0}")]
    NothingPublished(&'static str),
    /// A validator without rows.
    #[error("--validators {0}: there is no such site, or --sites leaves it out")]
    NoSuchValidator(NodeId),
    /// Nobody sends anything.
    #[error("--attack: sites of --mode {0} send nothing that could be attacked")]
    NothingSent(&'static str),
    /// Cold start and rounds need somebody else.
    #[error("{mode} training{cold} needs at least {needed} sites, found {found}; --mode local needs one")]
    TooFewSites {
        /// The mode's word.
        mode: &'static str,
        /// ` from a cold start`, or nothing.
        cold: &'static str,
        /// Fewest sites.
        needed: usize,
        /// Sites found.
        found: usize,
    },
}

impl From<UnitError> for ArgsError {
    fn from(error: UnitError) -> Self {
        Self::Unit(error)
    }
}

/// What is charged and noised in every release.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// What one release hides.
    pub unit: PrivacyUnit,
    /// ε of one site over the run.
    pub epsilon: Epsilon,
    /// δ of it.
    pub delta: Delta,
    /// Rows of one block.
    pub block_rows: usize,
    /// What blocks are cut into where one row is hidden.
    pub windows: Option<BlockWindows>,
    /// Clipping norm C of what a block adds.
    pub clip_norm: L2Norm,
    /// Noise multiplier σ.
    pub noise_multiplier: NoiseMultiplier,
}

/// Checked arguments.
#[derive(Debug, Clone)]
pub struct Settings {
    /// As they came.
    pub args: Args,
    /// `None`: no noise.
    pub terms: Option<Terms>,
    /// Time between rows.
    pub step: Duration,
    /// Hostile sites and what they do.
    pub malicious: Option<(usize, Attack)>,
    /// Hostile sites that the rule withstands.
    pub byzantine: usize,
}

impl Settings {
    /// Checks everything that does not depend on the data.
    ///
    /// # Errors
    /// [`ArgsError`]
    pub fn check(args: Args) -> Result<Self, ArgsError> {
        let (epsilon, delta) = (Epsilon::new(args.epsilon)?, Delta::new(args.delta)?);
        if let Some(rows) = args.cold_start.iter().find(|rows| **rows < ROWS_MIN) {
            return Err(ArgsError::ColdStart(*rows));
        }
        check_server(&args)?;
        let cut = args.record_window.is_some() || args.record_stride.is_some();
        if cut && (args.privacy != Privacy::Record || args.recipe == Recipe::Delta) {
            return Err(ArgsError::NothingCut);
        }
        let (unit, windows) = match args.privacy {
            Privacy::Off | Privacy::Block => (PrivacyUnit::Block, None),
            Privacy::Record => (PrivacyUnit::Record, windows(&args)?),
        };
        let (clip_norm, releases) = match args.recipe {
            // Every block is read once in the whole run, however many rounds there are.
            Recipe::Moments => (BLOCK_CLIP_NORM, 1),
            // Every round reads all rows again, so every round is charged to all of them.
            Recipe::Gradient => (GRADIENT_CLIP_NORM, args.rounds()),
            Recipe::Delta => (DELTA_CLIP_NORM, args.rounds()),
        };
        let mode = match args.mode {
            Mode::Federated => None,
            Mode::Local => Some("local"),
            Mode::Constant => Some("constant"),
            Mode::Central => Some("central"),
        };
        if let Some(mode) = mode.filter(|_| !args.validators.is_empty()) {
            return Err(ArgsError::NothingPublished(mode));
        }
        match args.mode {
            Mode::Federated => {
                let options = Options::for_round(args.rule, std::iter::empty(), args.privacy != Privacy::Off);
                options.check(args.rule)?;
            }
            Mode::Local if args.attack.is_some() => return Err(ArgsError::NothingSent("local")),
            Mode::Constant if args.attack.is_some() => return Err(ArgsError::NothingSent("constant")),
            Mode::Central if args.attack.is_some() => return Err(ArgsError::NothingSent("central")),
            Mode::Local | Mode::Constant | Mode::Central => {}
        }
        let terms = match args.privacy {
            Privacy::Off => None,
            Privacy::Block | Privacy::Record => {
                let sensitivity =
                    windows.map_or(unit.sensitivity(args.recipe.kind()), BlockWindows::sensitivity);
                let noise_multiplier =
                    calibrated_noise_multiplier(epsilon, delta, SamplingRate::FULL, releases, sensitivity)
                        .ok_or(ArgsError::NoNoise {
                            epsilon: epsilon.value(),
                            delta: delta.value(),
                        })?;
                Some(Terms {
                    unit,
                    epsilon,
                    delta,
                    block_rows: BLOCK_ROWS,
                    windows,
                    clip_norm: L2Norm::new(clip_norm)?,
                    noise_multiplier,
                })
            }
        };
        let malicious = args.malicious.zip(args.attack).filter(|(count, _)| *count > 0);
        let byzantine = args.byzantine.unwrap_or(malicious.map_or(0, |(count, _)| count));
        let step = Duration::from_secs(args.step.into());
        Ok(Self {
            args,
            terms,
            step,
            malicious,
            byzantine,
        })
    }

    /// Checks what depends on the number of sites.
    ///
    /// # Errors
    /// [`ArgsError`]
    pub fn check_sites(&self, found: usize) -> Result<(), ArgsError> {
        let cold = !self.args.cold_start.is_empty();
        let (mode, needed) = match (self.args.mode, cold) {
            (Mode::Local | Mode::Constant, _) => return Ok(()),
            (Mode::Federated, false) => ("federated", 1),
            (Mode::Federated, true) => ("federated", 2),
            (Mode::Central, false) => ("central", 1),
            (Mode::Central, true) => ("central", 2),
        };
        if found < needed {
            let cold = if cold { " from a cold start" } else { "" };
            return Err(ArgsError::TooFewSites {
                mode,
                cold,
                needed,
                found,
            });
        }
        let sites = found - usize::from(cold);
        match self.malicious {
            Some((malicious, _)) if malicious >= sites => {
                return Err(ArgsError::TooManyMalicious { malicious, sites });
            }
            _ => {}
        }
        if 2 * self.byzantine >= sites {
            return Err(ArgsError::TooManyByzantine {
                byzantine: self.byzantine,
                sites,
            });
        }
        if self.args.mode == Mode::Federated {
            let name = self.args.rule;
            let options = Options::for_round(name, std::iter::empty(), self.terms.is_some());
            rule(name, name.withstands(self.byzantine), &options)?.check(sites)?;
        }
        Ok(())
    }
}

fn check_server(args: &Args) -> Result<(), ArgsError> {
    let (rate, momentum) = (args.server_rate, args.server_momentum());
    let refuse = |name, range, got| Err(ArgsError::Server { name, range, got });
    if !(rate > 0.0 && rate <= 10.0) {
        return refuse("server-rate", "above 0 and at most 10", rate);
    }
    if !(0.0..1.0).contains(&momentum) {
        return refuse("server-momentum", "at least 0 and below 1", momentum);
    }
    if !(0.0..=1e6).contains(&args.proximal) {
        return refuse("proximal", "at least 0 and at most 1e6", args.proximal);
    }
    if args.mode == Mode::Central && args.recipe == Recipe::Delta {
        return Err(ArgsError::CentralDelta);
    }
    if args.round_blocks.is_some() && args.recipe != Recipe::Moments {
        return Err(ArgsError::RoundBlocks);
    }
    let free = args.recipe == Recipe::Gradient && args.privacy == Privacy::Off;
    if args.proximal > 0.0 && !free {
        return Err(ArgsError::LocalSteps("proximal"));
    }
    if args.recipe == Recipe::Gradient && args.local_steps.is_some() && !free {
        return Err(ArgsError::LocalSteps("local-steps"));
    }
    Ok(())
}

/// How blocks are cut; a weight change is made of all rows at once, so nothing is cut for it.
fn windows(args: &Args) -> Result<Option<BlockWindows>, ArgsError> {
    if args.recipe == Recipe::Delta {
        return Ok(None);
    }
    let window = args.record_window.unwrap_or(WINDOW_DEFAULT);
    let stride = args.record_stride.unwrap_or(window);
    let block_rows = u32::try_from(BLOCK_ROWS).unwrap_or(u32::MAX);
    RecordWindows::new(window, stride)
        .and_then(|windows| windows.in_block(block_rows))
        .map(Some)
        .map_err(ArgsError::Windows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn settings(line: &str) -> Settings {
        Settings::check(parse(line)).unwrap()
    }

    fn parse(line: &str) -> Args {
        let words = ["x", "--data", "d", "--out", "o"]
            .into_iter()
            .chain(line.split_whitespace());
        Cli::try_parse_from(words).unwrap().args
    }

    #[test]
    fn one_release_is_noised_as_the_accountant_says() {
        let terms = settings("--epsilon 4 --delta 1e-6").terms.unwrap();
        assert!(
            (1.2..1.4).contains(&terms.noise_multiplier.value()),
            "σ = {}",
            terms.noise_multiplier
        );
        assert_eq!(
            settings("--epsilon 4 --rounds 10").terms,
            Some(terms),
            "disjoint blocks compose in parallel"
        );
        assert_eq!(settings("--privacy off").terms, None);
        let sigma = |line| settings(line).terms.unwrap().noise_multiplier.value();
        let (once, often) = (sigma("--recipe delta"), sigma("--recipe delta --rounds 9"));
        assert!(
            (once / terms.noise_multiplier.value() - 2.0).abs() < 0.01 && (often / once - 3.0).abs() < 0.01,
            "deltas read everything every time: {once} {often}"
        );
        let third = sigma("--privacy record --record-window 20");
        assert!(
            (terms.noise_multiplier.value() / third - 3.0).abs() < 0.01,
            "{third}"
        );
        let overlapping = sigma("--privacy record --record-window 20 --record-stride 10");
        assert!(
            (overlapping / third - 3.0 * 2.0 / 5.0).abs() < 0.01,
            "{overlapping}"
        );
        let twenty = sigma("--recipe gradient");
        assert!((5.5..5.75).contains(&twenty), "{twenty}");
        assert!((sigma("--recipe gradient --rounds 5") / twenty - 0.5).abs() < 0.01);
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        for line in [
            "--epsilon 0",
            "--epsilon nan",
            "--delta 1",
            "--cold-start 19",
            "--server-rate 0",
            "--server-rate nan",
            "--server-momentum 1",
            "--proximal=-1",
            "--proximal 1",
            "--recipe gradient --local-steps 3",
            "--cold-start 60,19",
            "--record-window 20",
            "--record-stride 10 --privacy off",
            "--record-window 20 --privacy record --recipe delta",
            "--mode central --recipe delta",
            "--privacy record --record-window 10",
            "--privacy record --record-window 61",
            "--privacy record --record-stride 0",
        ] {
            assert!(Settings::check(parse(line)).is_err(), "{line}");
        }
        let words = |line: &str| {
            let words = ["x", "--data", "d", "--out", "o"]
                .into_iter()
                .chain(line.split_whitespace());
            Cli::try_parse_from(words.collect::<Vec<_>>())
        };
        for line in [
            "--rule best",
            "--attack nope --malicious 1",
            "--malicious 2",
            "--rounds 0",
            "--threads 0",
            "--recipe best",
        ] {
            assert!(words(line).is_err(), "{line}");
        }
        let hostile = settings("--attack nan --malicious 4");
        assert_eq!(hostile.byzantine, 4);
        assert!(hostile.check_sites(9).is_ok());
        assert!(matches!(
            hostile.check_sites(8),
            Err(ArgsError::TooManyByzantine {
                byzantine: 4,
                sites: 8
            })
        ));
        assert!(matches!(
            hostile.check_sites(4),
            Err(ArgsError::TooManyMalicious { .. })
        ));
        assert!(matches!(
            settings("--cold-start 60").check_sites(1),
            Err(ArgsError::TooFewSites { .. })
        ));
    }
}
