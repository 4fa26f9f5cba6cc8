//! Callers and what they call: who waits for whom.

use super::*;
use crate::policy::fleet::{FleetBudget, FleetSeen, RECORD_TIMEOUT};
use crate::policy::{ActionRule, RiskClass};

const CALLERS: [(&str, &[&str]); 2] = [("web", &["db"]), ("shop", &["db", "web"])];

/// `web` calls `db`, `shop` calls both; all are probed and up.
struct Site {
    machine: IncidentMachine,
    config: HealConfig,
    ms: u64,
    told: Vec<Notice>,
    /// What was asked to be carried out and has not ended.
    running: Vec<Intent>,
    done: Vec<(String, ActionKind)>,
    closed: Vec<Incident>,
}

impl Site {
    fn up() -> Self {
        Self::under(|_| {})
    }

    fn under(change: impl FnOnce(&mut HealPolicy)) -> Self {
        let mut policy = HealPolicy {
            autonomy: Autonomy::Act,
            settle: Duration::ZERO,
            anomaly_lasting: Duration::ZERO,
            ..HealPolicy::default()
        };
        change(&mut policy);
        let names = ["db", "web", "shop"];
        let depends_on = CALLERS.map(|(name, called)| {
            let called = called.iter().map(|name| (*name).to_owned()).collect();
            (name.to_owned(), called)
        });
        let config = HealConfig {
            services: names.map(|name| (name.to_owned(), policy.clone())).into(),
            node: NodeBudget::default(),
            depends_on: depends_on.into(),
            clock_id: "boot-1".to_owned(),
        };
        let mut site = Self {
            machine: IncidentMachine::new(config.clone()).probing(names),
            config,
            ms: 1_000,
            told: Vec::new(),
            running: Vec::new(),
            done: Vec::new(),
            closed: Vec::new(),
        };
        for name in names {
            let service = name.to_owned();
            site.tell(Input::Started { service, pid: 7 });
            site.probes(name, true, 3);
        }
        site
    }

    /// Intents are durable at once.
    fn tell(&mut self, input: Input) {
        self.ms += 50;
        self.machine.handle(now(self.ms), input);
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::RecordIntent(Intent { id, .. }) => {
                    self.machine.handle(now(self.ms), Input::IntentDurable { id });
                }
                Output::Execute(intent) => {
                    self.done.push((intent.service.clone(), intent.action));
                    self.running.push(intent);
                }
                Output::Closed(incident) => self.closed.push(incident),
                Output::Notify(notice) => self.told.push(notice),
                _ => {}
            }
        }
    }

    /// The node dies, with what it does, and comes back.
    fn restart(&mut self) {
        let state = self.machine.export();
        self.running.clear();
        self.machine = IncidentMachine::restore(self.config.clone(), state, now(self.ms));
        self.drain();
    }

    /// What people were told of a service that is still in trouble.
    fn reminders(&self, service: &str) -> Vec<&str> {
        self.told
            .iter()
            .filter(|notice| notice.service == service && notice.kind == NoticeKind::StillOpen)
            .map(|notice| notice.words.as_str())
            .collect()
    }

    fn pass(&mut self, ms: u64) {
        self.ms += ms;
        self.machine.handle_timeout(now(self.ms));
        self.drain();
    }

    fn probes(&mut self, service: &str, ok: bool, count: usize) {
        for _ in 0..count {
            self.tell(Input::Probe {
                service: service.to_owned(),
                ok,
                latency: Duration::from_millis(3),
                detail: "503".to_owned(),
            });
        }
    }

    fn dies(&mut self, service: &str) {
        self.tell(Input::Exited {
            service: service.to_owned(),
            status: "killed by signal 9".to_owned(),
        });
    }

    /// The action that runs comes to its end; it has to be the only one.
    fn acted(&mut self) -> Intent {
        assert_eq!(self.running.len(), 1, "{:?}", self.running);
        let intent = self.running.remove(0);
        self.tell(Input::Executed {
            id: intent.id,
            outcome: Outcome::Done,
        });
        intent
    }

    fn state(&self, service: &str) -> Option<IncidentState> {
        self.machine.open_incident(service).map(|open| open.state)
    }
}

fn now(ms: u64) -> Now {
    Now {
        monotonic: Duration::from_millis(ms),
        unix_ms: ms,
    }
}

#[test]
fn a_caller_waits_until_what_it_calls_is_verified_however_long_that_takes_and_is_then_asked_anew() {
    let mut site = Site::up();
    site.dies("db");
    site.acted();
    // The new process binds after seconds; in its grace nobody hears of its own failed probes.
    site.probes("web", false, 20);
    assert_eq!(
        site.machine.open_incident("web").unwrap().class,
        FaultClass::DependencyDown
    );
    site.probes("db", true, 2);
    site.probes("web", false, 5);
    assert_eq!(
        site.done,
        [("db".to_owned(), ActionKind::Start)],
        "web was touched"
    );
    site.probes("db", true, 1);
    assert!(site.state("db").is_none());
    // Its own trouble now, and two failures are enough.
    site.probes("web", false, 2);
    assert_eq!(
        site.done.last().unwrap(),
        &("web".to_owned(), ActionKind::Restart)
    );
}

#[test]
fn a_caller_that_answers_again_with_what_it_calls_is_never_touched() {
    let mut site = Site::up();
    site.dies("db");
    site.acted();
    site.probes("web", false, 6);
    site.probes("shop", false, 6);
    site.probes("db", true, 3);
    for name in ["web", "shop"] {
        site.probes(name, true, 3);
    }
    assert_eq!(site.done, [("db".to_owned(), ActionKind::Start)]);
    assert!(site.machine.open_incidents().next().is_none());
}

#[test]
fn a_caller_waits_for_what_a_person_has_while_that_is_silent_and_for_a_server_that_was_just_adopted() {
    let mut site = Site::up();
    site.tell(Input::DiskFull {
        service: "db".into(),
        free_bytes: 0,
    });
    assert_eq!(site.state("db"), Some(IncidentState::HandedToHuman));
    site.probes("db", false, 1);
    site.probes("web", false, 9);
    site.tell(Input::DiskRelieved { service: "db".into() });
    site.probes("db", true, 3);
    site.probes("web", true, 3);
    site.tell(Input::Started {
        service: "db".into(),
        pid: 8,
    });
    site.probes("web", false, 9);
    assert_eq!(site.done, []);
}

#[test]
fn a_caller_of_what_a_person_has_and_that_answers_is_healed_as_if_nothing_were_there() {
    type Told = fn(String, String) -> Input;

    let service = || "db".to_owned();
    let detail = || "page 7".to_owned();
    let troubles: [(Autonomy, Told, IncidentState); 3] = [
        (
            Autonomy::Act,
            |service, _| Input::DiskFull {
                service,
                free_bytes: 9_000,
            },
            IncidentState::HandedToHuman,
        ),
        (
            Autonomy::Act,
            |service, detail| Input::StateCorrupt { service, detail },
            IncidentState::HandedToHuman,
        ),
        (
            Autonomy::Recommend,
            |service, _| Input::Sessions {
                service,
                seen: SessionsSeen {
                    free: 0,
                    free_min: 5,
                    ..SessionsSeen::default()
                },
            },
            IncidentState::AwaitingApproval,
        ),
    ];
    for (autonomy, trouble, state) in troubles {
        let mut site = Site::under(|policy| {
            policy.autonomy = autonomy;
            policy.session_actions = true;
        });
        for _ in 0..2 {
            site.tell(trouble(service(), detail()));
        }
        assert_eq!(site.state("db"), Some(state));
        site.probes("db", true, 3);
        site.probes("web", false, 2);
        let web = site.machine.open_incident("web").unwrap();
        assert_eq!(web.class, FaultClass::Hang, "{}", web.why());
        let restarts = [("web".to_owned(), ActionKind::Restart)];
        assert!(
            autonomy != Autonomy::Act || site.done == restarts,
            "{:?}",
            site.done
        );
        // And through others.
        site.probes("shop", false, 2);
        let waits_for = site.machine.open_incident("shop").unwrap().why();
        assert!(waits_for.contains("web, which it calls, is down"), "{waits_for}");
    }
    // Behind a lock its callers wait, whatever it answers itself.
    let mut site = Site::up();
    for _ in 0..3 {
        site.tell(Input::Sessions {
            service: service(),
            seen: SessionsSeen {
                pile_up: Some(PileUp {
                    pid: 7,
                    birth: 1,
                    behind: 3,
                    waited_s: 60,
                    running: true,
                    statement: 0,
                    waits: RootWaits::Nothing,
                    touchable: false,
                }),
                free: 9,
                free_min: 5,
            },
        });
    }
    assert_eq!(site.state("db"), Some(IncidentState::HandedToHuman));
    site.probes("db", true, 3);
    site.probes("web", false, 9);
    assert_eq!(site.done, []);
}

#[test]
fn a_person_is_told_of_a_caller_that_goes_on_waiting_for_what_it_calls() {
    let mut site = Site::up();
    let every = u64::try_from(HealPolicy::default().remind_every.as_millis()).unwrap();
    site.tell(Input::DiskFull {
        service: "db".into(),
        free_bytes: 0,
    });
    site.probes("db", false, 2);
    site.probes("web", false, 3);
    site.pass(every / 2);
    assert_eq!(site.reminders("web"), [""; 0]);
    for times in 1..3 {
        site.pass(every);
        let words = "web is still dependency_down: db, which it calls, is down";
        assert!(
            site.reminders("web").iter().all(|said| said.starts_with(words)),
            "{:?}",
            site.reminders("web")
        );
        assert_eq!(site.reminders("web").len(), times);
    }
    assert_eq!(site.done, []);
}

#[test]
fn a_domain_does_not_wait_for_ever_for_word_of_what_became_of_an_action_and_hears_it_later() {
    let mut site = Site::up();
    let timeout = u64::try_from(HealPolicy::default().action_timeout.as_millis()).unwrap();
    site.dies("db");
    let id = site.running[0].id;
    site.restart();
    site.dies("web");
    site.pass(timeout - 1_000);
    assert_eq!(site.done.len(), 1, "web is not to be touched meanwhile");
    site.pass(2_000);
    assert_eq!(site.state("db"), Some(IncidentState::HandedToHuman));
    assert_eq!(
        site.done.last().unwrap(),
        &("web".to_owned(), ActionKind::Start),
        "web is dead"
    );
    site.tell(Input::Reconciled {
        id,
        running: true,
        took_effect: true,
    });
    assert_eq!(site.state("db"), Some(IncidentState::Verifying));
    site.probes("db", true, 3);
    assert!(site.state("db").is_none());
}

#[test]
fn what_was_called_off_for_two_reasons_at_once_is_given_back_once() {
    let mut site = Site::under(|policy| {
        policy.cooldown = Duration::ZERO;
        policy.fleet = Some(FleetBudget::default());
        let rule = |action| ActionRule {
            shared: action == ActionKind::Restart,
            ..ActionRule::example(RiskClass::of(action))
        };
        let rules = ActionKind::ALL.into_iter().map(|action| (action, rule(action)));
        policy.rules = Some(rules.collect());
    });
    let lasts = HealPolicy::default().action_timeout + RECORD_TIMEOUT + Duration::from_secs(10);
    let lend = |site: &Site| Input::Slot {
        until: now(site.ms + 50).monotonic + lasts,
    };
    let well = || {
        Input::Fleet(FleetSeen {
            nodes: 20,
            unhealthy: 1,
            acting: 0,
        })
    };
    let spent = |site: &Site| {
        let charges = site.machine.export().charges;
        charges.iter().filter(|of| of.service == "web").count()
    };
    site.tell(well());
    site.probes("web", false, 2);
    let slot = lend(&site);
    site.tell(slot);
    site.acted();
    site.probes("web", true, 3);
    assert_eq!((site.state("web"), spent(&site)), (None, 1));
    site.pass(60_000);
    site.tell(well());
    site.probes("web", false, 2);
    site.machine.handle(now(site.ms), lend(&site));
    let outputs: Vec<Output> = std::iter::from_fn(|| site.machine.poll_output()).collect();
    let id = outputs.iter().find_map(|output| match output {
        Output::RecordIntent(intent) => Some(intent.id),
        _ => None,
    });
    assert_eq!(spent(&site), 2);
    // What it calls has gone down meanwhile, which is another trouble and one to wait for.
    site.ms += 20_000;
    site.machine.handle(
        now(site.ms),
        Input::Exited {
            service: "db".into(),
            status: "killed by signal 9".into(),
        },
    );
    site.machine
        .handle(now(site.ms), Input::IntentDurable { id: id.unwrap() });
    assert_eq!(spent(&site), 1, "the one that was done");
}

#[test]
fn of_two_that_died_what_is_called_is_started_first_and_the_other_once_that_is_verified() {
    for caller_first in [false, true] {
        let mut site = Site::up();
        // Both are known dead before an intent is durable.
        let mut order = ["db", "web"];
        if caller_first {
            order.reverse();
        }
        for name in order {
            site.machine.handle(
                now(site.ms),
                Input::Exited {
                    service: name.to_owned(),
                    status: "killed by signal 9".to_owned(),
                },
            );
        }
        site.drain();
        assert_eq!(
            site.done,
            [("db".to_owned(), ActionKind::Start)],
            "{caller_first}"
        );
        site.acted();
        site.probes("db", true, 2);
        assert_eq!(site.done.len(), 1, "db is not verified yet");
        site.probes("db", true, 1);
        assert_eq!(site.acted().service, "web");
        site.probes("web", true, 3);
        let healed = |of: &Incident| of.state == IncidentState::Healed;
        assert!(site.closed.iter().filter(|of| healed(of)).count() == 2);
    }
}

#[test]
fn two_that_a_third_calls_are_not_acted_on_at_once_and_the_second_has_its_turn_when_the_time_of_the_first_is_over()
 {
    let mut site = Site::up();
    site.dies("web");
    site.dies("shop");
    assert_eq!(site.done, [("web".to_owned(), ActionKind::Start)]);
    site.acted();
    // It never answers.
    site.pass(29_000);
    assert_eq!(site.done.len(), 1);
    site.pass(2_000);
    while site.done.iter().all(|(name, _)| name != "shop") {
        if !site.running.is_empty() {
            site.acted();
        }
        site.pass(31_000);
        assert!(site.ms < 600_000, "shop never has its turn: {:?}", site.done);
    }
    assert!(site.running.len() <= 1);
}

#[test]
fn what_is_called_does_not_wait_for_a_verification_that_its_own_trouble_prevents() {
    let mut site = Site::up();
    site.probes("web", false, 2);
    assert_eq!(site.acted().action, ActionKind::Restart);
    assert_eq!(site.state("web"), Some(IncidentState::Verifying));
    site.dies("db");
    assert_eq!(site.acted().service, "db", "db waited for web");
    let web = site.machine.open_incident("web").unwrap();
    assert!(
        web.why()
            .contains("db, in the same failure domain, needs an action first")
    );
}

#[test]
fn what_was_restarted_on_suspicion_and_has_yet_to_serve_is_not_started_for_the_crash_of_its_caller() {
    let mut site = Site::under(|policy| policy.cooldown = Duration::ZERO);
    for _ in 0..9 {
        let cause = |channel: &str, contribution| Cause {
            channel: channel.to_owned(),
            contribution,
            rising: Some(true),
            evidence: None,
        };
        site.tell(Input::Anomaly {
            service: "db".to_owned(),
            score: 9.0,
            threshold: 3.0,
            causes: vec![cause("service_cpu", 5.0), cause("service_probe_latency", 1.0)],
        });
    }
    site.dies("web");
    assert_eq!(site.acted().action, ActionKind::Restart);
    assert_eq!(site.state("db"), Some(IncidentState::Verifying));
    site.probes("db", true, 1);
    let db = site.machine.open_incident("db").unwrap();
    assert_eq!(
        (db.class, db.actions.len()),
        (FaultClass::CpuContention, 1),
        "{}",
        db.why()
    );
    // Once it serves it makes way.
    site.probes("db", true, 3);
    assert_eq!(site.acted().service, "web");
    let of_db = site.done.iter().filter(|(service, _)| service == "db");
    assert_eq!(of_db.count(), 1, "{:?}", site.done);
}

#[test]
fn a_server_of_somebody_else_on_the_data_is_a_persons_at_once_and_is_looked_for_again_on_their_word() {
    for autonomy in [Autonomy::Observe, Autonomy::Recommend, Autonomy::Act] {
        let mut story = Story::new(|policy| policy.autonomy = autonomy);
        let occupied = || Input::Occupied {
            service: "a".into(),
            detail: "another server, process 4711, runs on /d".into(),
        };
        story.tell(occupied());
        // It answers, and that heals nothing.
        story.probes(true, 9);
        let incident = story.incident().unwrap().clone();
        assert_eq!(incident.state, IncidentState::HandedToHuman);
        assert!(incident.actions.is_empty() && incident.why().contains("process 4711"));
        story.tell(approve(incident.id, None, None));
        if autonomy == Autonomy::Observe {
            continue;
        }
        let start = story.recorded().unwrap();
        story.tell(Input::IntentDurable { id: start.id });
        story.tell(occupied());
        story.tell(Input::Executed {
            id: start.id,
            outcome: failed(false),
        });
        let incident = story.incident().unwrap();
        assert_eq!(
            (incident.state, incident.actions.len()),
            (IncidentState::HandedToHuman, 1)
        );
    }
}

#[test]
fn a_person_who_mended_it_has_a_handed_over_service_started_again() {
    let mut story = Story::new(|_| {});
    story.crash();
    for _ in 0..2 {
        while story.recorded().is_none() {
            story.pass(1_000);
        }
        story.carry_out(failed(false));
    }
    while story.state() != Some(IncidentState::HandedToHuman) {
        story.pass(1_000);
    }
    let id = story.incident().unwrap().id;
    story.pass(600_000);
    story.tell(approve(id, None, None));
    assert_eq!(story.carry_out(Outcome::Done).action, ActionKind::Start);
    story.probes(true, 3);
    assert_eq!(story.closed().state, IncidentState::Healed);
}
