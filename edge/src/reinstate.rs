//! What stands against services, shown; and the word of people that lifts it.

use theriac_heal::executor::clock;
use theriac_heal::incident::{IncidentMachine, Input};
use theriac_heal::standing::Standing;
use theriac_privacy::policy::signed::Subject;

use crate::respond::{Responder, signed_by};
use crate::store::Word;

impl Responder {
    /// Takes word that something is lifted. A digest of what stands no more, and a signature that does not count, change nothing.
    pub(crate) fn reinstate(&self, machine: &mut IncidentMachine, word: &Word) {
        let standings = machine.standings();
        let meant = |of: &&Standing| Some(of.hash()) == word.plan;
        let Some(standing) = standings.iter().find(meant).filter(|_| word.approve) else {
            tracing::warn!("what was to be lifted does not stand like that any more: nothing was lifted");
            return;
        };
        let by = match &word.signature {
            None => None,
            Some(signature) => {
                match signed_by(signature, Subject::Reinstatement, &standing.text(), &self.keys) {
                    Ok(key) => Some(key),
                    Err(why) => {
                        tracing::warn!(service = standing.service, why, "a reinstatement was refused");
                        return;
                    }
                }
            }
        };
        let service = standing.service.clone();
        machine.handle(
            clock::now(),
            Input::Reinstate {
                service: service.clone(),
                standing: standing.hash(),
                by,
            },
        );
        let lifted = machine.standing(&service).is_empty();
        tracing::info!(
            service,
            lifted,
            need = self.lifted_by,
            "word to reinstate a service was taken"
        );
    }

    /// Shows on each service's line what stands against it.
    pub(crate) fn show_standing(&self, machine: &IncidentMachine) {
        for name in self.hands.keys() {
            let held = machine.open_incident(name).and_then(|incident| incident.held());
            let mut words = machine.standing(name).words();
            words.extend(held.map(str::to_owned));
            self.board.update_service(name, |line| line.standing = words);
        }
    }
}
