//! The commands of people who decide about healing: approvals, what stands against a service, the policy and the log of rulings.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod command;

use std::time::Duration;

use command::{Place, json, problem};
use theriac_edge::state_dir::{Lock, StateDir};
use theriac_heal::executor::clock;
use theriac_heal::types::{Now, Plan};
use theriac_privacy::policy::signed::PolicyKey;

/// An incident whose start waits for approval, as the machine makes it, in a store of its own.
async fn awaiting_approval(place: &Place) -> (String, Plan) {
    awaiting_approval_since(place, clock::now(), Duration::from_mins(15)).await
}

/// Of a plan that holds for `ttl` from `now` on.
async fn awaiting_approval_since(place: &Place, now: Now, ttl: Duration) -> (String, Plan) {
    use theriac_heal::incident::{HealConfig, IncidentMachine, Input};
    use theriac_heal::policy::{ActionRule, Approvals, Autonomy, HealPolicy, NodeBudget, RiskClass};
    use theriac_heal::types::ActionKind;

    let rule = ActionRule {
        class: RiskClass::R2,
        autonomy: Autonomy::Recommend,
        cooldown: None,
        max: None,
        inhibit: std::collections::BTreeSet::new(),
        when: None,
        approvals: Some(Approvals {
            ttl,
            ..Approvals::default()
        }),
        evidence: false,
        shared: false,
    };
    let policy = HealPolicy {
        rules: Some([(ActionKind::Start, rule)].into()),
        ..HealPolicy::default()
    };
    let mut machine = IncidentMachine::new(HealConfig {
        services: [("kv".to_owned(), policy)].into(),
        node: NodeBudget::default(),
        depends_on: std::collections::BTreeMap::new(),
        clock_id: "boot".to_owned(),
    });
    let exited = Input::Exited {
        service: "kv".to_owned(),
        status: "exit status: 1".to_owned(),
    };
    machine.handle(now, exited);
    let incident = machine.open_incident("kv").unwrap();
    let dir = StateDir::open(&place.path("state")).unwrap();
    let store = theriac_edge::store::Store::open(&dir).unwrap();
    store.save_incident(incident).await.unwrap();
    let text = format!(
        "state_dir = '{}'\n[[service]]\nname = 'kv'\nargv = ['/bin/true']\n",
        place.text("state")
    );
    std::fs::write(place.path("edge.toml"), text).unwrap();
    (place.text("edge.toml"), incident.plan.clone().unwrap())
}

/// Holds what a running edge holds.
fn runs(place: &Place) -> Lock {
    StateDir::existing(&place.path("state")).lock().unwrap()
}

#[tokio::test]
async fn a_plan_whose_time_is_over_is_not_approved_and_nothing_is_noted() {
    let place = Place::new();
    let (config, _) = awaiting_approval_since(&place, Now::default(), Duration::from_millis(1)).await;
    let alone = problem(&["actions", "approve", "1", "--config", &config]).await;
    assert!(alone.to_string().contains("no edge runs"), "{alone}");
    let _edge = runs(&place);
    let over = problem(&["actions", "approve", "1", "--config", &config]).await;
    assert!(
        over.code == "TH-E0333" && over.to_string().contains("is over"),
        "{over}"
    );
    let dir = StateDir::open(&place.path("state")).unwrap();
    let store = theriac_edge::store::Store::open(&dir).unwrap();
    assert!(store.take_approvals().await.unwrap().is_empty());
    // Who declines it says something all the same.
    json(&["actions", "deny", "1", "--config", &config]).await;
}

#[tokio::test]
async fn an_approval_says_what_it_is_of_and_another_plan_than_the_one_meant_is_refused() {
    let place = Place::new();
    let (config, plan) = awaiting_approval(&place).await;
    let _edge = runs(&place);
    let other = problem(&["actions", "approve", "1", "--plan", "abc", "--config", &config]).await;
    assert!(
        other.code == "TH-E0333" && other.to_string().contains("start of kv for crash"),
        "{other}"
    );
    let dir = StateDir::open(&place.path("state")).unwrap();
    let store = theriac_edge::store::Store::open(&dir).unwrap();
    assert!(
        store.take_approvals().await.unwrap().is_empty(),
        "nothing was approved"
    );
    let meant = plan.hash();
    let said = json(&["actions", "approve", "1", "--plan", &meant, "--config", &config]).await;
    assert_eq!(
        (&said["action"], &said["class"], &said["plan"]),
        (&"start".into(), &"crash".into(), &meant.as_str().into())
    );
    let words = store.take_approvals().await.unwrap();
    assert_eq!((words.len(), words[0].plan.as_deref()), (1, Some(meant.as_str())));
}

#[tokio::test]
async fn what_stands_against_a_service_is_listed_and_lifted_by_a_signature_over_exactly_it() {
    use theriac_heal::breaker::Breaker;
    use theriac_heal::incident::MachineState;
    use theriac_heal::policy::RiskClass;
    use theriac_heal::standing::{Demotion, Standing};
    use theriac_heal::types::{ActionKind, When};
    use theriac_privacy::policy::signed::{PolicyKey, PolicySignature, Subject};

    let place = Place::new();
    let ann = PolicyKey::from_seed(&[7; 32]);
    std::fs::write(place.path("ann.key"), ann.to_text()).unwrap();
    let text = format!(
        "node = 'site-a'\nstate_dir = '{}'\n[healing_policy]\nkeys = ['{}']\n[[service]]\nname = 'kv'\nargv = ['/bin/true']\n",
        place.text("state"),
        ann.public()
    );
    std::fs::write(place.path("edge.toml"), text).unwrap();
    let config = place.text("edge.toml");
    let dir = StateDir::open(&place.path("state")).unwrap();
    let store = theriac_edge::store::Store::open(&dir).unwrap();
    let nothing = problem(&["actions", "reinstate", "kv", "--config", &config]).await;
    assert_eq!(nothing.code, "TH-E0378", "{nothing}");
    let state = MachineState {
        demoted: vec![Demotion {
            service: "kv".to_owned(),
            class: RiskClass::R2,
            at: When {
                monotonic_ms: 5,
                unix_ms: 1_700_000_000_000,
            },
        }],
        breakers: vec![Breaker {
            service: "kv".to_owned(),
            action: ActionKind::Hook,
            failures: 3,
            at_ms: 5,
            since_unix_ms: 1_700_000_000_000,
        }],
        ..MachineState::default()
    };
    store.save_machine(&state).await.unwrap();
    let standing = Standing::of("site-a", "kv", &state.demoted, &state.breakers);
    let listed = json(&["actions", "standing", "--config", &config]).await;
    assert_eq!(listed, serde_json::json!([standing]));
    let unsigned = problem(&["actions", "reinstate", "kv", "--config", &config]).await;
    assert!(
        unsigned.to_string().contains("1 of them have to sign"),
        "{unsigned}"
    );
    assert!(store.take_approvals().await.unwrap().is_empty());
    let key = place.text("ann.key");
    let said = json(&["actions", "reinstate", "kv", "--key", &key, "--config", &config]).await;
    assert_eq!(said["standing"], standing.hash().as_str());
    let words = store.take_approvals().await.unwrap();
    assert_eq!(words[0].incident, theriac_edge::store::REINSTATEMENT);
    let signature: PolicySignature = words[0].signature.as_ref().unwrap().parse().unwrap();
    signature
        .verify_text(Subject::Reinstatement, &standing.text(), ann.public())
        .unwrap();
    assert!(
        signature
            .verify_text(Subject::Approval, &standing.text(), ann.public())
            .is_err(),
        "it is no approval"
    );
}

fn keys(place: &Place, names: &[&str]) -> Vec<String> {
    (1_u8..)
        .zip(names)
        .map(|(seed, name)| {
            let key = PolicyKey::from_seed(&[seed; 32]);
            std::fs::write(place.path(&format!("{name}.key")), key.to_text()).unwrap();
            key.public().to_string()
        })
        .collect()
}

/// A policy that asks for two signatures for a start, signed by `ann`; the keys of `ann` and `bob` are pinned, the one of `eve` is not.
async fn under_policy(place: &Place, version: u64) -> String {
    let keys = keys(place, &["ann", "bob", "eve"]);
    let text = format!(
        "node = 'site-a'\nstate_dir = '{}'\n[healing_policy]\nfile = '{}'\nkeys = ['{}', '{}']\nneed = 1\n\
         [[service]]\nname = 'kv'\nargv = ['/bin/true']\n",
        place.text("state"),
        place.text("healing.toml"),
        keys[0],
        keys[1]
    );
    std::fs::write(place.path("edge.toml"), text).unwrap();
    let policy = format!(
        "version = {version}\n[autonomy]\ndefault = 'recommend'\n[[service]]\nname = 'kv'\n\
         action = [{{ id = 'start', class = 'R2', approvals = {{ need = 2, ttl = '15m' }} }}]\n"
    );
    std::fs::write(place.path("healing.toml"), policy).unwrap();
    let (file, key, config) = (
        place.text("healing.toml"),
        place.text("ann.key"),
        place.text("edge.toml"),
    );
    json(&["policy", "sign", &file, "--key", &key, "--config", &config]).await;
    config
}

#[tokio::test]
async fn an_approval_that_would_not_count_is_refused_and_not_noted() {
    let place = Place::new();
    awaiting_approval(&place).await;
    let _edge = runs(&place);
    let config = under_policy(&place, 1).await;
    let store = theriac_edge::store::Store::open(&StateDir::open(&place.path("state")).unwrap()).unwrap();
    let unsigned = problem(&["actions", "approve", "1", "--config", &config]).await;
    assert!(
        unsigned.to_string().contains("asks for 2 signatures"),
        "{unsigned}"
    );
    let eve = place.text("eve.key");
    let foreign = problem(&["actions", "approve", "1", "--key", &eve, "--config", &config]).await;
    assert!(foreign.to_string().contains("would not count"), "{foreign}");
    assert!(store.take_approvals().await.unwrap().is_empty());
    let bob = place.text("bob.key");
    let said = json(&["actions", "approve", "1", "--key", &bob, "--config", &config]).await;
    assert_eq!(said["signatures_needed"], 2);
    assert_eq!(store.take_approvals().await.unwrap().len(), 1);
    // Who declines needs no key.
    json(&["actions", "deny", "1", "--config", &config]).await;
}

#[tokio::test]
async fn what_waits_is_listed_with_the_digest_that_an_approval_names() {
    let place = Place::new();
    let (config, plan) = awaiting_approval(&place).await;
    let _edge = runs(&place);
    let listed = json(&["actions", "list", "--config", &config]).await;
    assert_eq!(listed[0]["plan"], plan.hash().as_str());
    let said = json(&[
        "actions",
        "approve",
        "1",
        "--plan",
        &plan.hash(),
        "--config",
        &config,
    ])
    .await;
    assert_eq!(said["decision"], "approved");
}

#[tokio::test]
async fn checks_refuse_a_policy_that_run_would_refuse_as_stale() {
    let place = Place::new();
    let config = under_policy(&place, 3).await;
    let dir = StateDir::open(&place.path("state")).unwrap();
    json(&["policy", "check", "--config", &config]).await;
    std::fs::write(dir.healing_version(), "4\n").unwrap();
    for words in [["policy", "check"].as_slice(), &["check-config"]] {
        let stale = problem(&[words, &["--config", &config]].concat()).await;
        assert!(
            stale.code == "TH-E0370" && stale.to_string().contains("version 4"),
            "{stale}"
        );
    }
}

#[tokio::test]
async fn checks_name_what_the_policy_lists_and_nothing_can_do_and_what_is_configured_and_not_listed() {
    let place = Place::new();
    let config = under_policy(&place, 1).await;
    let text = std::fs::read_to_string(place.path("edge.toml")).unwrap();
    for words in [["policy", "check"].as_slice(), &["check-config"]] {
        let said = json(&[words, &["--config", &config]].concat()).await;
        assert_eq!(said["warnings"], serde_json::json!([]), "{words:?}");
    }
    let hook = "[service.hook]\nargv = ['/bin/true']\nfor = ['overload']\n";
    std::fs::write(place.path("edge.toml"), format!("{text}{hook}")).unwrap();
    let policy = std::fs::read_to_string(place.path("healing.toml")).unwrap();
    let rungs =
        "action = [{ id = 'throttle_cpu', class = 'R2' }, { id = 'terminate_blocker', class = 'R1' },";
    std::fs::write(place.path("healing.toml"), policy.replace("action = [", rungs)).unwrap();
    let (file, key) = (place.text("healing.toml"), place.text("ann.key"));
    json(&["policy", "sign", &file, "--key", &key, "--config", &config]).await;
    for words in [["policy", "check"].as_slice(), &["check-config"]] {
        let said = json(&[words, &["--config", &config]].concat()).await;
        assert_eq!(
            said["warnings"],
            serde_json::json!([
                "kv: the policy lists what this configuration has no means for, so it is never done: \
                 terminate_blocker (needs [service.sessions], which only PostgreSQL takes), throttle_cpu (needs [service.cgroup] throttle_cpu)",
                "kv: configured, and not listed by the policy, so the node never does it by itself: hook",
            ]),
            "{words:?}"
        );
    }
}

#[tokio::test]
async fn a_log_of_rulings_is_replayed_from_a_file_elsewhere() {
    let place = Place::new();
    let config = under_policy(&place, 1).await;
    std::fs::write(place.path("rulings.jsonl"), "").unwrap();
    let log = place.text("rulings.jsonl");
    let said = json(&[
        "--log",
        "info",
        "policy",
        "replay",
        "--rulings",
        &log,
        "--config",
        &config,
    ])
    .await;
    assert_eq!(
        (&said["same"], &said["head"]),
        (&0.into(), &serde_json::Value::Null)
    );
}
