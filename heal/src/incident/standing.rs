//! What stands against a service, and what came of actions: demoted, broken, proved, reinstated.

use std::collections::BTreeSet;

use super::{IncidentMachine, Output, Phase, Record};
use crate::evidence::{Came, Counts};
use crate::policy::RiskClass;
use crate::standing::{Demotion, Reinstated, Standing};
use crate::types::{ActionKind, Incident, NoticeKind, Now};

impl IncidentMachine {
    /// Everything that stands against a service.
    pub fn standing(&self, service: &str) -> Standing {
        Standing::of(&self.name, service, &self.demoted, self.breakers.all())
    }

    /// That of every service against which anything stands.
    pub fn standings(&self) -> Vec<Standing> {
        let standings = self.services.keys().map(|service| self.standing(service));
        standings.filter(|standing| !standing.is_empty()).collect()
    }

    /// Lifts everything that stands against a service, once so many people as it takes have said so of exactly this.
    pub(super) fn reinstate(&mut self, now: Now, service: &str, standing: &str, by: Option<String>) {
        let present = self.standing(service);
        if present.is_empty() || present.hash() != standing || (self.reinstate_need > 0 && by.is_none()) {
            self.ignored += 1;
            return;
        }
        let (of, signed) = self.reinstating.entry(service.to_owned()).or_default();
        if of.as_str() != standing {
            standing.clone_into(of);
            signed.clear();
        }
        signed.extend(by);
        if signed.len() < self.reinstate_need as usize {
            return;
        }
        let by = self
            .reinstating
            .remove(service)
            .map_or_else(BTreeSet::new, |(_, signed)| signed);
        self.breakers.close(service);
        self.demoted.retain(|of| of.service != service);
        // What harmed has to prove itself anew, and one harm of a session action is the first again.
        let mut evidence = std::mem::take(&mut self.evidence);
        evidence.retain(|of| {
            let class = self.class_of(service, of.action);
            of.service != service || !present.demotions.iter().any(|lifted| lifted.covers(class))
        });
        self.evidence = evidence;
        self.outputs.push_back(Output::Reinstated(Box::new(Reinstated {
            unix_ms: now.unix_ms,
            policy: self.policy.clone(),
            lifted: present,
            by,
            previous: String::new(),
        })));
        // What waited for a breaker is tried at once; what harm handed over stays a person's.
        if let Some(open) = self.open.get_mut(service)
            && let Phase::Handed {
                retry_at: Some(_), ..
            } = open.phase
        {
            open.phase = Phase::Watching { undecided: true };
        }
        self.decide_again(now, service);
    }

    /// Words for what no longer stands count no more, even were the same to stand again.
    pub(super) fn drop_former_words(&mut self) {
        let mut signed = std::mem::take(&mut self.reinstating);
        signed.retain(|service, (of, _)| self.standing(service).hash() == *of);
        self.reinstating = signed;
    }

    /// One harm of a brief interruption or worse takes its class and what is above down to recommending; of what touches one session, the
    /// second does, for its like.
    pub(super) fn harmed(&mut self, now: Now, record: Incident) {
        let last = record.last_action();
        let word = last.map_or_else(|| "the action".to_owned(), |action| action.to_string());
        let class = last.map_or(RiskClass::R2, |action| self.class_of(&record.service, action));
        let harms: u32 = self
            .evidence
            .iter()
            .filter(|of| {
                of.service == record.service && self.class_of(&of.service, of.action) <= RiskClass::R1
            })
            .map(|of| of.counts.harm)
            .sum();
        if class > RiskClass::R1 || harms >= 2 {
            let known = |of: &Demotion| of.service == record.service && of.class == class;
            if !self.demoted.iter().any(known) {
                self.demoted.push(Demotion {
                    service: record.service.clone(),
                    class,
                    at: now.when(),
                });
            }
            let words = format!(
                "{word} harmed {}: it answered before and does not now. The node only recommends {} for it from now on, until \
                 `theriac-edge actions reinstate {}`",
                record.service,
                if class > RiskClass::R1 {
                    format!("actions of {class} and above")
                } else {
                    "actions of R0 and R1".to_owned()
                },
                record.service
            );
            self.notify(&record, NoticeKind::Demoted, words);
        }
        self.hand_over(now, record, format!("{word} did harm"));
    }

    /// What came of a decision, for whoever may let the node act by itself.
    pub(super) fn note_evidence(&mut self, service: &str, action: ActionKind, came: Came) {
        let of = self.configured(service, action);
        let known = self
            .evidence
            .iter()
            .position(|of| of.service == service && of.action == action);
        let at = known.unwrap_or_else(|| {
            self.evidence.push(Record {
                service: service.to_owned(),
                action,
                of,
                counts: Counts::default(),
            });
            self.evidence.len() - 1
        });
        if let Some(of) = self.evidence.get_mut(at) {
            of.counts.add(came);
        }
    }

    /// What people configured changes what an action is: a record of another program or address says nothing of this one.
    pub(super) fn drop_foreign_evidence(&mut self) {
        let mut evidence = std::mem::take(&mut self.evidence);
        evidence.retain(|record| record.of == self.configured(&record.service, record.action));
        self.evidence = evidence;
    }

    /// What came of an action that was only written down, where that is known: trouble that ended without it did not need it, and a new
    /// process that somebody else gave the service did what it would have done.
    pub(super) fn note_unneeded(&mut self, record: &Incident) {
        let Some(would) = record.would.as_ref().filter(|_| record.actions.is_empty()) else {
            return;
        };
        let served = self.services.get(&record.service).is_some_and(|seen| seen.served);
        let came = match (would.renewed, served) {
            (false, _) => Some(Came::Wrong),
            (true, true) => Some(Came::Right),
            (true, false) => None,
        };
        if let Some(came) = came {
            self.note_evidence(&record.service, would.action, came);
        }
    }

    fn configured(&self, service: &str, action: ActionKind) -> Option<String> {
        let policy = &self.services.get(service)?.policy;
        policy.target_digests.get(&action).cloned()
    }

    fn class_of(&self, service: &str, action: ActionKind) -> RiskClass {
        self.services
            .get(service)
            .map_or(RiskClass::of(action), |seen| seen.policy.class_of(action))
    }
}
