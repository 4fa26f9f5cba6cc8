//! The ordinary way.

use theriac_aggregator::store::records;
use theriac_edge::global_store::model_of;
use theriac_protocol::units::ModelVersion;

use crate::child::run;
use crate::fleet::{BLOCK_ROWS, Centre, Edge, moments};

#[test]
fn init_serve_join_and_run_give_a_published_model() {
    let root = tempfile::tempdir().unwrap();
    let rounds =
        moments("quorum = 1\nrule = \"mean\"\ndeadline = \"3s\"\npause = \"100ms\"\nrounds_max = 20");
    let mut centre = Centre::init(root.path(), &rounds);
    centre.serve();
    let mut edge = Edge::new(root.path(), "press-1", "");
    // The very line that `init` printed, and nothing else but where the state goes.
    let mut words: Vec<&str> = centre.join_line.split_whitespace().collect();
    assert_eq!(words.remove(0), "theriac-edge");
    let state = edge.dir.to_str().unwrap();
    words.extend(["--state-dir", state]);
    run("edge", &words).expect_done();
    edge.start();
    // The first publications may come before the edge has rows to judge them by; it goes on without them until then.
    let status = edge.until("a published model in use", |status| {
        status.updates_accepted >= 1 && status.model_version >= 1 && status.gate == "accepted"
    });
    assert_eq!(status.node, "press-1");
    assert!(status.epsilon_spent.unwrap() > 0.0 && status.epsilon_spent < status.epsilon_limit);
    let seen = centre.until("the publication", |status| {
        status.rounds_published >= 1 && status.sites[0].epsilon.is_some()
    });
    assert_eq!(
        seen.sites[0].last_verdict, None,
        "the gate's verdict depends on the site's rows and was sent"
    );
    assert!(seen.rounds_published >= 1 && seen.model_version >= 1);
    assert!(seen.sites[0].epsilon.is_some());
    edge.stop();
    centre.stop();
}

/// Recipe B between programs: each round reads blocks again and is charged, the model carries its momentum over a restart of the
/// aggregator, and an edge whose policy does not name gradients goes on without them.
#[test]
fn rounds_of_gradients_step_on_over_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let rounds = format!(
        "[rounds]\nkind = \"gradient\"\nblock_rows = {BLOCK_ROWS}\nblocks_min = 1\nblocks_max = 4\nquorum = 1\nrule = \"mean\"\n\
         deadline = \"3s\"\npause = \"200ms\"\n"
    );
    let mut centre = Centre::init(root.path(), &rounds);
    centre.serve();
    let mut edge = Edge::under(
        root.path(),
        "press-1",
        "mechanisms = [\"gradient\"]\nblock_releases_max = 100",
    );
    edge.enrol(&centre);
    edge.start();
    let status = edge.until("three rounds of gradients", |status| status.updates_accepted >= 3);
    assert!(status.epsilon_spent.unwrap() > 0.0 && status.epsilon_spent < status.epsilon_limit);
    let before = centre.status().model_version;
    centre.stop();
    centre.serve();
    // An edge whose policy names moments alone says so, and holds nobody up.
    let mut plain = Edge::new(root.path(), "press-2", "");
    plain.enrol(&centre);
    plain.start();
    let after = centre.until("rounds after the restart, and a decline", |status| {
        let declined = status
            .sites
            .iter()
            .any(|site| site.declines.contains_key("unknown_layout"));
        status.model_version > before + 1 && declined
    });
    let after = after.model_version;
    assert!(before >= 2, "{before}");
    plain.stop();
    edge.stop();
    centre.stop();
    let database = centre.database();
    let payload = |version: u64| {
        records::model_payload(database.read(), database.blobs(), ModelVersion(version)).unwrap()
    };
    let channels = theriac_model::feature::FeatureSchema::host_service_v1().channels();
    for version in 1..=after {
        let model = model_of(channels, &payload(version)).unwrap();
        let descent = model.descent();
        assert_eq!(u64::from(descent.steps), version, "every round stepped once");
        assert!(descent.velocity.iter().any(|v| *v != 0.0));
    }
}
