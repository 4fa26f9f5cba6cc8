//! A policy file in front of the machine: what it does not list, inhibits, bounds or leaves to people is not done; a service is not
//! blamed for what it calls; and every ruling says the same when it is asked again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::time::Duration;

use theriac_heal::incident::{HealConfig, IncidentMachine, Input, Output, ProcessState};
use theriac_heal::policy::evaluate::{Because, Ruling, RulingRecord, evaluate};
use theriac_heal::policy::expression::Expression;
use theriac_heal::policy::file::PolicyFile;
use theriac_heal::policy::{Autonomy, HealPolicy, NodeBudget};
use theriac_heal::types::{ActionKind, FaultClass, IncidentState, Now, Outcome, Plan};

struct World {
    machine: IncidentMachine,
    policies: BTreeMap<String, HealPolicy>,
    node: NodeBudget,
    seconds: u64,
    rulings: Vec<RulingRecord>,
    executed: Vec<ActionKind>,
}

impl World {
    fn new(file: &str) -> Self {
        let below = HealPolicy {
            autonomy: Autonomy::Act,
            // Counts for nothing under a file.
            restore_autonomy: Autonomy::Act,
            cooldown: Duration::ZERO,
            ..HealPolicy::default()
        };
        let mut policies: BTreeMap<String, HealPolicy> = ["app", "db"]
            .into_iter()
            .map(|name| (name.to_owned(), below.clone()))
            .collect();
        let mut node = NodeBudget::default();
        if !file.is_empty() {
            let file: PolicyFile = toml::from_str(file).unwrap();
            node = file.over(&mut policies, node).unwrap();
        }
        let config = HealConfig {
            services: policies.clone(),
            node,
            depends_on: BTreeMap::from([("app".to_owned(), vec!["db".to_owned()])]),
            clock_id: "boot".to_owned(),
        };
        let mut world = Self {
            machine: IncidentMachine::new(config),
            policies,
            node,
            seconds: 1_000,
            rulings: Vec::new(),
            executed: Vec::new(),
        };
        for service in ["db", "app"] {
            let service = service.to_owned();
            world.tell(Input::Started {
                service: service.clone(),
                pid: 7,
            });
            // One that was just started has to prove that it serves.
            for _ in 0..3 {
                world.probe(&service, true);
            }
        }
        world
    }

    fn tell(&mut self, input: Input) {
        self.seconds += 1;
        let now = Now {
            monotonic: Duration::from_secs(self.seconds),
            unix_ms: self.seconds * 1_000,
        };
        self.machine.handle(now, input);
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::RecordIntent(intent) => {
                    self.machine.handle(now, Input::IntentDurable { id: intent.id });
                }
                Output::Execute(intent) => {
                    self.executed.push(intent.action);
                    let outcome = Outcome::Failed {
                        detail: "exit code 1".to_owned(),
                        running: false,
                    };
                    self.machine.handle(
                        now,
                        Input::Executed {
                            id: intent.id,
                            outcome,
                        },
                    );
                }
                Output::Ruled(record) => self.rulings.push(*record),
                _ => {}
            }
        }
    }

    fn probe(&mut self, service: &str, ok: bool) {
        self.tell(Input::Probe {
            service: service.to_owned(),
            ok,
            latency: Duration::from_millis(5),
            detail: "timed out".to_owned(),
        });
    }

    fn crash(&mut self, service: &str) {
        self.tell(Input::Exited {
            service: service.to_owned(),
            status: "killed by signal 9".to_owned(),
        });
    }

    fn state(&self, service: &str) -> IncidentState {
        self.machine.open_incident(service).unwrap().state
    }

    /// What a third party does with the log.
    fn replay(&self) {
        assert!(!self.rulings.is_empty());
        for record in &self.rulings {
            let text = serde_json::to_string(record).unwrap();
            let read: RulingRecord = serde_json::from_str(&text).unwrap();
            let says = evaluate(&self.policies[&read.facts.service], self.node, &read.facts);
            assert_eq!(says, read.ruling, "{text}");
            // Logged with each, and taken for 1 in a line from before it was.
            assert!(text.contains("\"propensity\":1.0"), "{text}");
            let older = text.replacen("\"propensity\":1.0,", "", 1);
            assert_eq!(serde_json::from_str::<RulingRecord>(&older).unwrap(), read);
        }
    }
}

fn file(actions: &str) -> String {
    format!("version = 1\n[[service]]\nname = \"db\"\naction = [{actions}]\n")
}

#[test]
fn a_listed_action_is_done_within_its_own_budget() {
    let mut world = World::new(&file(
        "{ id = \"start\", class = \"R2\", autonomy = \"act\", max = \"1/1h\" }",
    ));
    world.crash("db");
    assert_eq!(world.executed, [ActionKind::Start]);
    let last = world.rulings.last().unwrap();
    assert_eq!(
        last.ruling,
        Ruling::Refuse {
            because: Because::ActionSpent {
                max: 1,
                window_ms: 3_600_000
            }
        }
    );
    assert_eq!(world.state("db"), IncidentState::HandedToHuman);
    world.replay();
}

#[test]
fn what_is_not_listed_is_not_done() {
    let mut world = World::new(&file("{ id = \"restart\", class = \"R2\", autonomy = \"act\" }"));
    world.crash("db");
    world.crash("app");
    assert!(world.executed.is_empty());
    assert!(world.rulings.iter().all(|record| record.ruling
        == Ruling::Refuse {
            because: Because::NotListed
        }));
    world.replay();
}

#[test]
fn a_condition_that_does_not_hold_or_is_unknown_refuses() {
    for when in ["diag.class == 'hang'", "risk.p > 0.1", "not risk.p > 0.1"] {
        let mut world = World::new(&file(&format!(
            "{{ id = \"start\", class = \"R2\", autonomy = \"act\", when = \"{when}\" }}"
        )));
        world.crash("db");
        assert!(world.executed.is_empty(), "{when}");
        world.replay();
    }
    let mut world = World::new(&file(
        "{ id = \"start\", class = \"R2\", autonomy = \"act\", when = \"diag.class == 'crash' and diag.p >= 0.99\" }",
    ));
    world.crash("db");
    assert!(!world.executed.is_empty());
}

#[test]
fn moving_state_needs_a_person_whatever_the_file_says() {
    let mut world = World::new(&file(
        "{ id = \"restore_and_start\", class = \"R3\", autonomy = \"act\" }",
    ));
    let service = || "db".to_owned();
    world.tell(Input::Exited {
        service: service(),
        status: "exit code 3".to_owned(),
    });
    world.tell(Input::StateCorrupt {
        service: service(),
        detail: "page 7".to_owned(),
    });
    assert!(world.executed.is_empty());
    assert_eq!(world.state("db"), IncidentState::AwaitingApproval);
    let incident = world.machine.open_incident("db").unwrap().id;
    let plan = world
        .machine
        .open_incident("db")
        .unwrap()
        .plan
        .as_ref()
        .map(Plan::hash);
    world.tell(Input::Approve {
        incident,
        plan,
        by: None,
    });
    assert_eq!(world.executed, [ActionKind::RestoreAndStart]);
    world.replay();
}

#[test]
fn low_risk_autonomy_recommends_a_restart() {
    let text = file("{ id = \"start\", class = \"R2\" }").replace(
        "version = 1\n",
        "version = 1\nautonomy = { default = \"act-low-risk\" }\n",
    );
    let mut world = World::new(&text);
    world.crash("db");
    assert_eq!(world.state("db"), IncidentState::AwaitingApproval);
    assert!(world.executed.is_empty());
}

#[test]
fn a_service_that_calls_one_that_is_down_is_not_restarted() {
    let mut world = World::new("");
    let stopped = || Input::Process {
        service: "db".to_owned(),
        state: ProcessState::Stopped,
    };
    world.tell(stopped());
    for _ in 0..3 {
        world.probe("app", false);
    }
    let app = world.machine.open_incident("app").unwrap();
    assert_eq!(
        (app.class, app.state),
        (FaultClass::DependencyDown, IncidentState::Open)
    );
    assert!(app.handed_over.is_none() && world.executed.is_empty());
    // The dependency itself is healed; the caller comes back with it.
    world.tell(stopped());
    assert_eq!(world.executed.first(), Some(&ActionKind::Restart));
    let app = world.machine.open_incident("app").unwrap();
    assert!(app.actions.is_empty(), "{:?}", app.actions);
    for _ in 0..3 {
        world.probe("app", true);
    }
    assert!(world.machine.open_incident("app").is_none());
    world.replay();
}

#[test]
fn when_the_dependency_serves_again_and_the_caller_does_not_it_is_the_callers_turn() {
    let mut world = World::new("");
    world.probe("db", false);
    for _ in 0..3 {
        world.probe("app", false);
    }
    assert!(world.executed.is_empty());
    world.probe("db", true);
    assert!(
        world.executed.is_empty(),
        "what it did not answer meanwhile says nothing of itself"
    );
    for _ in 0..3 {
        world.probe("app", false);
    }
    assert_eq!(
        world.executed.first(),
        Some(&ActionKind::Restart),
        "now it hangs by itself"
    );
    let app = world.machine.open_incident("app").unwrap();
    assert_ne!(app.class, FaultClass::DependencyDown);
}

#[test]
fn what_is_never_helped_by_a_restart_cannot_be_taken_off_the_inhibitions() {
    let world = World::new(&file(""));
    for class in [
        FaultClass::DiskFull,
        FaultClass::Overload,
        FaultClass::DependencyDown,
    ] {
        assert!(world.policies["db"].inhibit.contains(&class));
    }
}

#[test]
fn the_policy_and_the_conditions_of_the_guide_hold() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/healing.md");
    let guide = std::fs::read_to_string(path).unwrap();
    let at = guide
        .find("```toml\nversion = 1")
        .expect("the guide shows a policy");
    let text = guide[at + "```toml\n".len()..].split("```").next().unwrap();
    let file: PolicyFile = toml::from_str(text).unwrap();
    let mut policies = BTreeMap::from([("kv".to_owned(), HealPolicy::default())]);
    let node = file.over(&mut policies, NodeBudget::default()).unwrap();
    assert_eq!(
        (node.max_actions, policies["kv"].rules.as_ref().unwrap().len()),
        (4, 3)
    );
    let conditions: Vec<&str> = guide
        .match_indices("when = '")
        .filter_map(|(at, start)| guide[at + start.len()..].split('\'').next())
        .collect();
    assert!(conditions.len() >= 4, "{conditions:?}");
    for condition in conditions {
        Expression::parse(condition).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn budgets_of_the_fleet_hold_for_every_service_and_are_in_the_digest_and_nothing_is_without_them() {
    use theriac_heal::policy::evaluate::digest;
    let rest = "version = 1\n[[service]]\nname = 'app'\naction = [{ id = 'restart', class = 'R2' }]\n";
    let fleet = "[budgets]\nfleet = { max_nodes_acting = '10%', hold_max = '5m' }\n";
    let plain = World::new(rest);
    let text = serde_json::to_string(&plain.policies).unwrap();
    assert!(!text.contains("fleet") && !text.contains("shared"), "{text}");
    let with = World::new(&rest.replacen("[[service]]", &format!("{fleet}[[service]]"), 1));
    for (name, policy) in &with.policies {
        let budget = policy.fleet.unwrap();
        let read = (budget.max_nodes_acting.hundredths(), budget.hold_max);
        assert_eq!(read, (10, Duration::from_mins(5)), "{name}");
    }
    let digests = [&plain, &with].map(|world| digest(world.policies.iter(), world.node));
    assert_ne!(digests[0], digests[1]);
}

#[test]
fn a_shared_action_without_budgets_of_the_fleet_and_a_misspelt_budget_are_refused() {
    let over = |text: &str| {
        let file: PolicyFile = toml::from_str(text).map_err(|error| error.to_string())?;
        let mut policies = BTreeMap::from([("app".to_owned(), HealPolicy::default())]);
        let laid = file.over(&mut policies, NodeBudget::default());
        laid.map(drop).map_err(|error| error.to_string())
    };
    let action = "[[service]]\nname = 'app'\naction = [{ id = 'restart', class = 'R2', shared = true }]\n";
    let alone = over(&format!("version = 1\n{action}")).unwrap_err();
    assert!(
        alone.contains("`restart`") && alone.contains("[budgets]"),
        "{alone}"
    );
    assert_eq!(
        over(&format!("version = 1\n[budgets]\nfleet = {{}}\n{action}")),
        Ok(())
    );
    for bad in [
        "{ max_nodes = '20%' }",
        "{ hold_max = '1s' }",
        "{ stop_if_unhealthy_over = '0%' }",
    ] {
        assert!(
            over(&format!("version = 1\n[budgets]\nfleet = {bad}\n")).is_err(),
            "{bad} was taken"
        );
    }
}
