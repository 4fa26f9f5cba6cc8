//! What stands against letting a node act on a service by itself: demotions after harm, breakers that are open; and how a person lifts it.

use std::collections::BTreeSet;

use serde::{Deserialize, Deserializer, Serialize};

use crate::breaker::Breaker;
use crate::policy::RiskClass;
use crate::types::When;

/// An action of this class harmed the service: actions of it are only recommended until a person lifts that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demotion {
    /// The service.
    pub service: String,
    /// The class in which the action stood.
    pub class: RiskClass,
    /// When.
    pub at: When,
}

impl Demotion {
    /// Whether an action of `class` is meant too. What touches one session within seconds (R0, R1) stands for its like alone; harm by
    /// anything more speaks against everything that is as risky or more so.
    pub fn covers(&self, class: RiskClass) -> bool {
        if self.class <= RiskClass::R1 {
            class <= RiskClass::R1
        } else {
            class >= self.class
        }
    }
}

/// Demotions as they are stored. Builds before this one demoted the whole service and wrote its name alone.
pub(crate) fn demotions<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Demotion>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Whole(String),
        OfClass(Demotion),
    }
    let written = Vec::<Written>::deserialize(deserializer)?;
    Ok(written
        .into_iter()
        .flat_map(|written| match written {
            Written::Whole(service) => [RiskClass::R1, RiskClass::R2]
                .map(|class| Demotion {
                    service: service.clone(),
                    class,
                    at: When::default(),
                })
                .to_vec(),
            Written::OfClass(demotion) => vec![demotion],
        })
        .collect())
}

/// Everything that stands against one service. A person lifts exactly this: were it to change meanwhile, their word counts no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// The node.
    pub node: String,
    /// The service.
    pub service: String,
    /// Classes of actions that are only recommended.
    pub demotions: Vec<Demotion>,
    /// Executors that keep failing, whose breakers are open.
    pub breakers: Vec<Breaker>,
}

impl Standing {
    /// What stands against a service, of everything that stands.
    pub fn of(node: &str, service: &str, demotions: &[Demotion], breakers: &[Breaker]) -> Self {
        let broken = |of: &&Breaker| of.service == service && of.tripped().is_some();
        Self {
            node: node.to_owned(),
            service: service.to_owned(),
            demotions: demotions
                .iter()
                .filter(|of| of.service == service)
                .cloned()
                .collect(),
            breakers: breakers.iter().filter(broken).cloned().collect(),
        }
    }

    /// One line of words for each thing that stands against it.
    pub fn words(&self) -> Vec<String> {
        let demoted = self.demotions.iter().map(|of| {
            let what = if of.class <= RiskClass::R1 {
                "R0 and R1 are".to_owned()
            } else {
                format!("{} and above are", of.class)
            };
            format!(
                "actions of {what} only recommended, since one of {} did harm",
                of.class
            )
        });
        let broken = self.breakers.iter().map(|of| {
            let failures = of.failures;
            format!(
                "the breaker of {} is open after {failures} failures in a row",
                of.action
            )
        });
        demoted.chain(broken).collect()
    }

    /// Whether anything stands against it.
    pub fn is_empty(&self) -> bool {
        self.demotions.is_empty() && self.breakers.is_empty()
    }

    /// The text that is signed: one line each, in this order.
    pub fn text(&self) -> String {
        let demotions = self
            .demotions
            .iter()
            .map(|of| format!("demoted {} at {}\n", of.class, of.at.unix_ms));
        let breakers = self
            .breakers
            .iter()
            // Not how often: that changes with every attempt, and several people could never sign the same.
            .map(|of| format!("breaker {} failing since {}\n", of.action, of.since_unix_ms));
        let stands: String = demotions.chain(breakers).collect();
        format!(
            "reinstate\nnode {}\nservice {}\n{stands}",
            self.node, self.service
        )
    }

    /// SHA-256 of [`Standing::text`], hexadecimal.
    pub fn hash(&self) -> String {
        use sha2::Digest as _;
        data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(self.text()))
    }
}

/// That a person lifted what stood against a service, as it is written down among the rulings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reinstated {
    /// Milliseconds since the Unix epoch.
    pub unix_ms: u64,
    /// The policies that held, see [`crate::policy::evaluate::digest`].
    pub policy: String,
    /// What was lifted.
    pub lifted: Standing,
    /// Whose signatures are under it; empty for the word of somebody at the host.
    pub by: BTreeSet<String>,
    /// SHA-256 of the line before it in the log, hexadecimal. Whoever writes the log fills it in.
    #[serde(default)]
    pub previous: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harm_by_a_session_action_stands_for_its_like_and_harm_by_more_for_all_above() {
        let of = |class| Demotion {
            service: "a".to_owned(),
            class,
            at: When::default(),
        };
        for (class, covered) in [
            (RiskClass::R1, [true, true, false, false, false]),
            (RiskClass::R2, [false, false, true, true, true]),
            (RiskClass::R3, [false, false, false, true, true]),
        ] {
            let all = [
                RiskClass::R0,
                RiskClass::R1,
                RiskClass::R2,
                RiskClass::R3,
                RiskClass::R4,
            ];
            assert_eq!(all.map(|other| of(class).covers(other)), covered, "{class}");
        }
    }

    #[test]
    fn a_service_that_an_earlier_build_demoted_stays_demoted_as_a_whole() {
        let mut read = serde_json::Deserializer::from_str(r#"["kv"]"#);
        let found = demotions(&mut read).unwrap();
        for class in [RiskClass::R1, RiskClass::R2, RiskClass::R3] {
            assert!(found.iter().any(|of| of.service == "kv" && of.covers(class)));
        }
        let written = serde_json::to_string(&found).unwrap();
        let mut read = serde_json::Deserializer::from_str(&written);
        assert_eq!(demotions(&mut read).unwrap(), found);
    }
}
