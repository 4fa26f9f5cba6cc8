//! What a shadow run showed, and whether that is enough. Pure.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How far a checkpoint came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The copy is complete.
    Taken,
    /// Its bytes are digested and stored.
    Hashed,
    /// A second one has run on them.
    Shadowed,
}

/// What a check says of the copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// It holds.
    Pass,
    /// The copy is bad, and why.
    Invalid(String),
    /// The check could not be made, and why: nothing is said of the copy.
    Unknown(String),
}

/// One check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// Its name, one of [`ShadowKind::needed`] or another.
    pub name: String,
    /// What it says.
    pub finding: Finding,
    /// How long it took, seconds.
    pub seconds: f64,
    /// Figures for people, such as how much was read.
    pub detail: String,
}

impl Check {
    /// A check without figures.
    pub fn new(name: &str, finding: Finding) -> Self {
        Self {
            name: name.to_owned(),
            finding,
            seconds: 0.0,
            detail: String::new(),
        }
    }

    /// With figures.
    #[must_use]
    pub fn detail(self, detail: String) -> Self {
        Self { detail, ..self }
    }
}

/// What a shadow is a second one of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShadowKind {
    /// A PostgreSQL server.
    #[default]
    Postgresql,
    /// A Redis server.
    Redis,
    /// Readers of SQLite databases.
    Sqlite,
}

impl ShadowKind {
    /// Checks without which no copy is valid, in their order.
    pub fn needed(self) -> &'static [&'static str] {
        match self {
            Self::Postgresql => &NEEDED,
            Self::Redis => &["load", "keys", "invariants"],
            Self::Sqlite => &["integrity", "full read", "invariants"],
        }
    }
}

/// All that a run showed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ShadowRun {
    /// What ran.
    #[serde(default)]
    pub kind: ShadowKind,
    /// Each state reached, with the seconds that it took.
    pub states: Vec<(State, f64)>,
    /// The checks, in their order.
    pub checks: Vec<Check>,
    /// How the shadow was kept from the primary.
    pub isolation: String,
    /// What bounded its resources.
    pub limits: String,
}

impl ShadowRun {
    pub(super) fn of(kind: ShadowKind) -> Self {
        Self {
            kind,
            ..Self::default()
        }
    }

    pub(super) fn reached(&mut self, state: State, took: Duration) {
        self.states.push((state, took.as_secs_f64()));
    }

    pub(super) fn push(&mut self, check: Check, begun: Instant) {
        let seconds = begun.elapsed().as_secs_f64();
        self.checks.push(Check { seconds, ..check });
    }

    /// Adds the manifest's check and what the shadow showed meanwhile.
    pub(super) fn join(&mut self, (manifest, took): (Check, Duration), shadow: Self) {
        let seconds = took.as_secs_f64();
        self.checks.push(Check { seconds, ..manifest });
        self.checks.extend(shadow.checks);
        self.states.extend(shadow.states);
        (self.isolation, self.limits) = (shadow.isolation, shadow.limits);
    }

    /// The verdict: a single bad finding makes the copy invalid, whatever else could not be checked; a needed check that did not
    /// pass leaves it unproved. Only a full pass is a pass.
    pub fn finding(&self) -> Finding {
        let bad = self.checks.iter().find_map(|check| match &check.finding {
            Finding::Invalid(why) => Some(format!("{}: {why}", check.name)),
            Finding::Pass | Finding::Unknown(_) => None,
        });
        if let Some(why) = bad {
            return Finding::Invalid(why);
        }
        let open = self.checks.iter().find_map(|check| match &check.finding {
            Finding::Unknown(why) => Some(format!("{}: {why}", check.name)),
            Finding::Pass | Finding::Invalid(_) => None,
        });
        open.map_or(Finding::Pass, Finding::Unknown)
    }

    /// The same, and every needed check must be there.
    pub fn complete(&self) -> Finding {
        let missing = self
            .kind
            .needed()
            .iter()
            .find(|name| !self.checks.iter().any(|check| check.name == **name));
        match (self.finding(), missing) {
            (Finding::Pass, Some(name)) => Finding::Unknown(format!("{name} was not checked")),
            (finding, _) => finding,
        }
    }
}

/// Those of a PostgreSQL copy.
pub const NEEDED: [&str; 6] = [
    "version",
    "recovery",
    "structure",
    "heap read",
    "workload",
    "invariants",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn run(findings: &[(&str, Finding)]) -> ShadowRun {
        ShadowRun {
            checks: findings
                .iter()
                .map(|(name, finding)| Check::new(name, finding.clone()))
                .collect(),
            ..ShadowRun::default()
        }
    }

    #[test]
    fn only_every_needed_check_passed_is_a_pass() {
        let all: Vec<(&str, Finding)> = NEEDED.iter().map(|name| (*name, Finding::Pass)).collect();
        assert_eq!(run(&all).complete(), Finding::Pass);
        for left_out in 0..all.len() {
            let mut fewer = all.clone();
            let (name, _) = fewer.remove(left_out);
            assert!(
                matches!(run(&fewer).complete(), Finding::Unknown(_)),
                "without {name} it passed"
            );
            for worse in [Finding::Unknown("u".into()), Finding::Invalid("i".into())] {
                let mut other = all.clone();
                other[left_out].1 = worse;
                assert_ne!(run(&other).complete(), Finding::Pass, "{name}");
            }
        }
        assert!(matches!(ShadowRun::default().complete(), Finding::Unknown(_)));
    }

    #[test]
    fn a_bad_finding_outweighs_what_could_not_be_checked() {
        let found = run(&[
            ("recovery", Finding::Unknown("late".into())),
            ("structure", Finding::Invalid("page 7".into())),
        ]);
        assert_eq!(found.finding(), Finding::Invalid("structure: page 7".into()));
    }
}
