//! The ordinary way.

use crate::child::run;
use crate::fleet::{Centre, Edge, moments};

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
    let status = edge.until("a published model in use", |status| {
        status.updates_accepted >= 1 && status.model_version >= 1
    });
    assert_eq!(
        (status.node.as_str(), status.gate.as_str()),
        ("press-1", "accepted")
    );
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
