//! What hostile sites do to what they send.
//!
//! Every attack on values is a pure function of a [`Scene`]: the honest updates of the round (colluders know them all), what the
//! hostile sites would have sent, the round, a seed and the deployed rule. It works on values that are already clipped and
//! noised and stands for edges whose program was replaced: no such code is reachable from the `theriac-edge` binary. Two
//! kinds are no functions of values: [`Kind::is_poison`] spoils a site's rows before anything is made of them ([`poison`]), and
//! [`Kind::is_message`] sends a good update in a bad way.
//!
//! One family a file: [`lone`] (a site by itself), [`collude`] (from the mean and spread of the honest), [`geometry`] (as far as an
//! honest update could be), [`optimise`] (against the deployed rule), [`poison`] (false data).

pub mod collude;
pub mod geometry;
pub mod lone;
pub mod optimise;
pub mod poison;
pub mod statistics;

use std::fmt;
use std::str::FromStr;

use theriac_protocol::units::Round;

pub use geometry::Direction;
use statistics::{Gaussian, Spread};

/// What colluding sites know of a round.
pub struct Scene<'a> {
    /// Honest updates, `[n − f]` rows of `d` values.
    pub honest: &'a [Vec<f32>],
    /// What the hostile sites would have sent, `[f]` rows of `d` values.
    pub own: &'a [Vec<f32>],
    /// The round.
    pub round: Round,
    /// Seed of whatever is random.
    pub seed: u64,
    /// What the rule made of the round before.
    pub previous: Option<&'a [f32]>,
    /// The public norm bound S of an update.
    pub bound: f64,
    /// What the aggregator would make of the honest updates beside these; `None` where that gives no result.
    pub deployed: &'a Deployed<'a>,
}

/// Hostile rows to what the aggregator would make of them and the honest ones.
pub type Deployed<'a> = dyn Fn(&[Vec<f32>]) -> Option<Vec<f32>> + 'a;

impl fmt::Debug for Scene<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scene")
            .field("honest", &self.honest.len())
            .field("own", &self.own.len())
            .field("round", &self.round)
            .field("seed", &self.seed)
            .field("bound", &self.bound)
            .finish_non_exhaustive()
    }
}

/// One attack without regard to jitter. Factors are in hundredths, so that attacks can be compared and ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Every value of the own update is negated and enlarged.
    SignFlip,
    /// Minus τ times the mean of the honest (inner product manipulation; Xie, Koyejo and Gupta 2020).
    Ipm(u16),
    /// The mean of the honest plus z standard deviations (Baruch, Baruch and Goldberg 2019; they subtract).
    Alie(i16),
    /// As far along the direction as the honest lie from each other (Shejwalkar and Houmansadr 2021).
    MinMax(Direction),
    /// The same with the sum of squared distances.
    MinSum(Direction),
    /// ALIE whose z does most harm to the deployed rule.
    OptAlie,
    /// IPM whose τ does most harm to the deployed rule.
    OptIpm,
    /// Copies of one honest update (Karimireddy, He and Jaggi 2022).
    Mimic,
    /// Copies of one hostile site's own update: one site with many names.
    Sybil,
    /// The mean of the honest, smaller, without noise of its own: near to all of them, as a copy is to its original.
    Evict,
    /// Orthogonal to what the last round gave, as far as the honest lie from their mean (Özfatura et al. 2023, ROP).
    HistoryAware,
    /// The mean of the honest and always the same small step beside it.
    Drift,
    /// The last tenth of the values reversed, enlarged to outweigh the mean, cut to the norm bound (Bagdasaryan et al. 2020).
    Backdoor,
    /// Noise of the norm of an honest update.
    GaussianNoise,
    /// Noise far stronger than the agreed law.
    ScaledNoise,
    /// Nothing but zeros.
    FreeRiderZero,
    /// What the last round gave, with a little noise.
    FreeRiderEcho,
    /// Targets negated, before anything is made of them.
    PoisonNegate,
    /// Rows in random order, before anything is made of them.
    PoisonShuffle,
    /// Targets times 0.6, before anything is made of them.
    PoisonScale,
    /// Targets times 0.87, just within what the vet lets pass.
    PoisonScaleMild,
    /// Some values are not a number.
    Nan,
    /// One value is infinite.
    Infinite,
    /// One value is infinitely low.
    NegativeInfinite,
    /// Every value is the smallest number above zero.
    Subnormal,
    /// One value is 1e30.
    Huge,
    /// One value too few.
    WrongLength,
    /// An update made for another round.
    Replay,
    /// A good update, and a reversed one after it.
    Duplicate,
    /// A good update after the round is over.
    Late,
}

/// An attack, perhaps with independent noise on every colluder so that no two send the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attack {
    /// What is done.
    pub kind: Kind,
    /// Whether noise of the honest standard deviation is added, independent for each colluder.
    pub jittered: bool,
}

impl Kind {
    /// Every attack that is listed, in the order of `attack list`.
    const LISTED: &'static [Self] = &[
        Self::SignFlip,
        Self::Ipm(10),
        Self::Ipm(50),
        Self::Ipm(100),
        Self::Ipm(300),
        Self::Ipm(1000),
        Self::Alie(25),
        Self::Alie(50),
        Self::Alie(100),
        Self::Alie(150),
        Self::Alie(300),
        Self::Alie(-25),
        Self::Alie(-50),
        Self::Alie(-100),
        Self::Alie(-150),
        Self::Alie(-300),
        Self::MinMax(Direction::Deviation),
        Self::MinMax(Direction::Sign),
        Self::MinMax(Direction::Mean),
        Self::MinSum(Direction::Deviation),
        Self::MinSum(Direction::Sign),
        Self::MinSum(Direction::Mean),
        Self::OptAlie,
        Self::OptIpm,
        Self::Mimic,
        Self::Sybil,
        Self::Evict,
        Self::HistoryAware,
        Self::Drift,
        Self::Backdoor,
        Self::GaussianNoise,
        Self::ScaledNoise,
        Self::FreeRiderZero,
        Self::FreeRiderEcho,
        Self::PoisonNegate,
        Self::PoisonShuffle,
        Self::PoisonScale,
        Self::PoisonScaleMild,
        Self::Nan,
        Self::Infinite,
        Self::NegativeInfinite,
        Self::Subnormal,
        Self::Huge,
        Self::WrongLength,
        Self::Replay,
        Self::Duplicate,
        Self::Late,
    ];

    /// Whether the attack is on the rows that an update is made of.
    pub fn is_poison(self) -> bool {
        matches!(
            self,
            Self::PoisonNegate | Self::PoisonShuffle | Self::PoisonScale | Self::PoisonScaleMild
        )
    }

    /// Whether a good update is sent in a bad way.
    pub fn is_message(self) -> bool {
        matches!(
            self,
            Self::WrongLength | Self::Replay | Self::Duplicate | Self::Late
        )
    }

    /// Whether colluders need the honest updates, or one another's.
    pub fn colludes(self) -> bool {
        matches!(
            self,
            Self::Ipm(_)
                | Self::Alie(_)
                | Self::MinMax(_)
                | Self::MinSum(_)
                | Self::OptAlie
                | Self::OptIpm
                | Self::Mimic
                | Self::Sybil
                | Self::Evict
                | Self::HistoryAware
                | Self::Drift
                | Self::Backdoor
        )
    }

    fn name(self) -> String {
        let hundredths = |value: u16| f32::from(value) / 100.0;
        let direction = |direction: Direction| direction.word();
        match self {
            Self::SignFlip => "sign-flip".to_owned(),
            Self::Ipm(tau) => format!("ipm-{}", hundredths(tau)),
            Self::Alie(z) if z < 0 => format!("alie-down-{}", hundredths(z.unsigned_abs())),
            Self::Alie(z) => format!("alie-up-{}", hundredths(z.unsigned_abs())),
            Self::MinMax(along) => format!("min-max-{}", direction(along)),
            Self::MinSum(along) => format!("min-sum-{}", direction(along)),
            Self::OptAlie => "opt-alie".to_owned(),
            Self::OptIpm => "opt-ipm".to_owned(),
            Self::Mimic => "mimic".to_owned(),
            Self::Sybil => "sybil".to_owned(),
            Self::Evict => "evict".to_owned(),
            Self::HistoryAware => "history-aware".to_owned(),
            Self::Drift => "drift".to_owned(),
            Self::Backdoor => "backdoor".to_owned(),
            Self::GaussianNoise => "gaussian".to_owned(),
            Self::ScaledNoise => "scaled-noise".to_owned(),
            Self::FreeRiderZero => "free-rider-zero".to_owned(),
            Self::FreeRiderEcho => "free-rider-echo".to_owned(),
            Self::PoisonNegate => "poison-negate".to_owned(),
            Self::PoisonShuffle => "poison-shuffle".to_owned(),
            Self::PoisonScale => "poison-scale".to_owned(),
            Self::PoisonScaleMild => "poison-scale-mild".to_owned(),
            Self::Nan => "nan".to_owned(),
            Self::Infinite => "infinite".to_owned(),
            Self::NegativeInfinite => "negative-infinite".to_owned(),
            Self::Subnormal => "subnormal".to_owned(),
            Self::Huge => "huge".to_owned(),
            Self::WrongLength => "wrong-length".to_owned(),
            Self::Replay => "replay".to_owned(),
            Self::Duplicate => "duplicate".to_owned(),
            Self::Late => "late".to_owned(),
        }
    }

    fn description(self) -> String {
        match self {
            Self::Ipm(tau) => {
                return format!(
                    "colluders send minus {} times the mean of the honest updates",
                    f32::from(tau) / 100.0
                );
            }
            Self::Alie(z) => {
                let (side, z) = (
                    if z < 0 { "minus" } else { "plus" },
                    f32::from(z.unsigned_abs()) / 100.0,
                );
                return format!(
                    "colluders send the honest mean {side} {z} standard deviations of the honest updates"
                );
            }
            Self::MinMax(along) => {
                return format!(
                    "colluders go against {} until one honest update is as far as the two farthest honest ones",
                    along.phrase()
                );
            }
            Self::MinSum(along) => {
                return format!(
                    "colluders go against {} until the sum of squared distances is the largest honest one",
                    along.phrase()
                );
            }
            Self::SignFlip => "negates every value and multiplies it by five: pulls the model the wrong way",
            Self::OptAlie => {
                "the honest mean plus as many standard deviations as move the deployed rule farthest"
            }
            Self::OptIpm => "minus as many times the honest mean as move the deployed rule farthest",
            Self::Mimic => "colluders copy one honest update: outweighs the others",
            Self::Sybil => "colluders copy one hostile site's own update: one site with many names",
            Self::Evict => {
                "colluders send 0.8 times the honest mean without noise: near to everybody, so that a screen for copies takes the honest for copies"
            }
            Self::HistoryAware => {
                "a step across what the last round gave, as long as honest ones: hides from rules with a memory"
            }
            Self::Drift => "the honest mean and the same small step in every round: adds up unseen",
            Self::Backdoor => {
                "reverses the last tenth of the model and enlarges it to the norm bound: replaces a part"
            }
            Self::GaussianNoise => "replaces the update by noise of an honest norm: says nothing, looks alike",
            Self::ScaledNoise => "replaces the update by noise twenty times as strong: drowns the others",
            Self::FreeRiderZero => "sends zeros: takes the model and gives nothing",
            Self::FreeRiderEcho => "sends what the last round gave with a little noise: gives nothing new",
            Self::PoisonNegate => "learns from rows whose targets are negated",
            Self::PoisonShuffle => "learns from its rows in random order",
            Self::PoisonScale => "learns from rows whose targets are 0.6 times as large",
            Self::PoisonScaleMild => {
                "learns from rows whose targets are 0.87 times as large: within the bounds of the vet, which it knows"
            }
            Self::Nan => "plants NaN among the values: ruins any rule that averages without looking",
            Self::Infinite => "sets one value to infinity",
            Self::NegativeInfinite => "sets one value to minus infinity",
            Self::Subnormal => "sets every value to the smallest number above zero: slows arithmetic down",
            Self::Huge => "sets one value to 1e30: a plain mean follows it anywhere",
            Self::WrongLength => "sends one value too few",
            Self::Replay => "sends an update that was made for another round",
            Self::Duplicate => "sends a good update, then a reversed one under the same name",
            Self::Late => "sends a good update after the round is over",
        }
        .to_owned()
    }
}

impl Attack {
    /// Negated and enlarged.
    pub const SIGN_FLIP: Self = Self::plain(Kind::SignFlip);

    /// The attack without jitter.
    pub const fn plain(kind: Kind) -> Self {
        Self {
            kind,
            jittered: false,
        }
    }

    /// Every attack that is listed: each, and each colluding one again with jitter.
    pub fn all() -> Vec<Self> {
        let twins = |kind: &Kind| {
            [false, true]
                .into_iter()
                .filter(|jittered| !jittered || kind.colludes())
                .map(|jittered| Self {
                    kind: *kind,
                    jittered,
                })
                .collect::<Vec<_>>()
        };
        Kind::LISTED.iter().flat_map(twins).collect()
    }

    /// The name on the command line; a jittered one ends with `-jittered`.
    pub fn name(self) -> String {
        let name = self.kind.name();
        if self.jittered { name + "-jittered" } else { name }
    }

    /// What it does, in one line.
    pub fn description(self) -> String {
        let description = self.kind.description();
        if self.jittered {
            description + "; each with noise of its own"
        } else {
            description
        }
    }

    /// What the hostile sites send instead of `scene.own`, `[f]` rows. Same scene, same rows.
    ///
    /// Poison and attacks on messages leave values alone. Where there is no honest update, the own ones stand for them. Empty
    /// updates stay empty.
    #[must_use]
    pub fn craft(self, scene: &Scene<'_>) -> Vec<Vec<f32>> {
        if self.kind.is_poison() || self.kind.is_message() {
            return scene.own.to_vec();
        }
        let rows = if scene.honest.is_empty() {
            scene.own
        } else {
            scene.honest
        };
        let honest = Spread::of(rows);
        let count = scene.own.len();
        let jitter = self.jitter(scene, &honest);
        let copies = |row: &[f32]| {
            let one = |noise: &Vec<f32>| row.iter().zip(noise).map(|(row, noise)| row + noise).collect();
            if jitter.is_empty() {
                vec![row.to_vec(); count]
            } else {
                jitter.iter().map(one).collect::<Vec<Vec<f32>>>()
            }
        };
        let each = |one: &dyn Fn(usize, &[f32]) -> Vec<f32>| {
            scene
                .own
                .iter()
                .enumerate()
                .map(|(index, own)| one(index, own))
                .collect()
        };
        let noise = |index: usize| Gaussian::new(scene.seed, scene.round, index);
        match self.kind {
            Kind::SignFlip => each(&|_, own| lone::sign_flip(own)),
            Kind::ScaledNoise => each(&|index, own| lone::scaled_noise(own, &mut noise(index))),
            Kind::GaussianNoise => {
                let norm =
                    rows.iter().map(|row| statistics::norm(row)).sum::<f64>() / rows.len().max(1) as f64;
                each(&|index, own| lone::noise_of_norm(own.len(), norm, &mut noise(index)))
            }
            Kind::FreeRiderZero => each(&|_, own| vec![0.0; own.len()]),
            Kind::FreeRiderEcho => {
                each(&|index, own| lone::echo(own.len(), scene.previous, &honest, &mut noise(index)))
            }
            Kind::Nan => each(&|_, own| lone::plant_nan(own)),
            Kind::Infinite => each(&|_, own| lone::first_set_to(own, f32::INFINITY)),
            Kind::NegativeInfinite => each(&|_, own| lone::first_set_to(own, f32::NEG_INFINITY)),
            Kind::Subnormal => each(&|_, own| vec![f32::from_bits(1); own.len()]),
            Kind::Huge => each(&|_, own| lone::first_set_to(own, 1e30)),
            Kind::Ipm(tau) => copies(&collude::ipm(&honest, f32::from(tau) / 100.0)),
            Kind::Alie(z) => copies(&collude::alie(&honest, f32::from(z) / 100.0)),
            Kind::MinMax(along) => copies(&geometry::min_max(rows, &honest, along)),
            Kind::MinSum(along) => copies(&geometry::min_sum(rows, &honest, along)),
            Kind::OptAlie => optimise::against(scene, &honest.mean, |z| copies(&collude::alie(&honest, z))),
            Kind::OptIpm => optimise::against(scene, &honest.mean, |tau| copies(&collude::ipm(&honest, tau))),
            Kind::Mimic => copies(rows.first().map_or(&[][..], Vec::as_slice)),
            Kind::Sybil => copies(scene.own.first().map_or(&[][..], Vec::as_slice)),
            Kind::Evict => copies(&honest.mean.iter().map(|value| 0.8 * value).collect::<Vec<f32>>()),
            Kind::HistoryAware => copies(&collude::across(rows, &honest, scene.previous, scene.seed)),
            Kind::Drift => copies(&collude::drift(&honest, scene.seed)),
            Kind::Backdoor => copies(&collude::backdoor(
                &honest,
                rows.len() + count,
                count,
                scene.bound,
            )),
            Kind::PoisonNegate
            | Kind::PoisonShuffle
            | Kind::PoisonScale
            | Kind::PoisonScaleMild
            | Kind::WrongLength
            | Kind::Replay
            | Kind::Duplicate
            | Kind::Late => scene.own.to_vec(),
        }
    }

    /// Noise of the honest standard deviation for each colluder; nothing without jitter.
    fn jitter(self, scene: &Scene<'_>, honest: &Spread) -> Vec<Vec<f32>> {
        if !self.jittered {
            return Vec::new();
        }
        let one = |index| {
            let mut noise = Gaussian::new(scene.seed ^ 0x6A69_7474_6572, scene.round, index);
            honest
                .deviation
                .iter()
                .map(|deviation| deviation * noise.draw())
                .collect()
        };
        (0..scene.own.len()).map(one).collect()
    }

    /// What a lone edge sends that knows no other's update; only for attacks that need none.
    #[must_use]
    pub fn apply(self, round: Round, values: Vec<f32>) -> Vec<f32> {
        let own = [values];
        let scene = Scene {
            honest: &[],
            own: &own,
            round,
            seed: 0,
            previous: None,
            bound: f64::INFINITY,
            deployed: &|_| None,
        };
        self.craft(&scene).pop().unwrap_or_default()
    }
}

impl fmt::Display for Attack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// A name that is none of [`Attack::all`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownAttack {
    /// There is none of this name.
    #[error(
        "`{0}` is no attack; `theriac-lab attack list` shows them: sign-flip, ipm-1, opt-ipm-jittered, …"
    )]
    Name(String),
    /// It needs what one edge alone does not know or cannot do.
    #[error(
        "`{0}` is nothing that one edge can do to the values of its update by itself; use it with `theriac-lab simulate`, or choose sign-flip, nan, huge or scaled-noise"
    )]
    NotAlone(String),
}

impl FromStr for Attack {
    type Err = UnknownAttack;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::all()
            .into_iter()
            .find(|attack| attack.name() == name)
            .ok_or_else(|| UnknownAttack::Name(name.to_owned()))
    }
}

/// The attack of this name, if one edge can carry it out on the values of its updates without knowing others'.
///
/// # Errors
/// [`UnknownAttack`]
pub fn alone(name: &str) -> Result<Attack, UnknownAttack> {
    let attack: Attack = name.parse()?;
    let kind = attack.kind;
    if kind.colludes() || kind.is_poison() || kind.is_message() {
        return Err(UnknownAttack::NotAlone(name.to_owned()));
    }
    Ok(attack)
}

#[cfg(test)]
mod tests;
