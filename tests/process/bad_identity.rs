//! An edge whose keys, certificate or clock are no good: it watches its host all the same, and says what to do.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, SystemTime};

use theriac_certs::authority::Validity;
use theriac_edge::status::{Federation, Status};
use tokio::runtime::Runtime;

use crate::fleet::Edge;
use crate::played::Played;

/// Starts the edge, waits for these words about the federation, and for samples meanwhile.
fn stays_alone(edge: &mut Edge, words: &[&str]) -> Status {
    edge.start();
    let status = edge.until("word of what is wrong", |status| {
        let detail = status.federation_detail.clone().unwrap_or_default();
        words.iter().all(|word| detail.contains(word))
    });
    assert_eq!(status.federation, Federation::Connecting);
    edge.until_rows(5);
    edge.kill();
    status
}

#[test]
fn unusable_keys_switch_only_the_federation_off() {
    let root = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    let centre = runtime.block_on(async { Played::new() });
    let mut edge = Edge::new(root.path(), "press-1", "");
    centre.enlist(&edge);
    let key = edge.dir.join("keys/edge.pem");
    let good = fs::read(&key).unwrap();

    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    stays_alone(
        &mut edge,
        &["keys/edge.pem", "0644", "chmod 600", "theriac-edge join"],
    );
    let doctor = edge.run(&["doctor"]).expect_code(1);
    assert!(doctor.stdout.contains("chmod 600"), "{}", doctor.stdout);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();

    fs::write(&key, b"garbage").unwrap();
    stays_alone(&mut edge, &["keys/edge.pem", "unreadable", "theriac-edge join"]);
    fs::write(&key, &good[..good.len() / 2]).unwrap();
    stays_alone(&mut edge, &["keys/edge.pem", "theriac-edge join"]);
    fs::write(&key, &good).unwrap();

    let authority = edge.dir.join("keys/aggregator-authority.pem");
    let kept = fs::read(&authority).unwrap();
    fs::write(
        &authority,
        b"-----BEGIN CERTIFICATE-----\n%%%\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    stays_alone(&mut edge, &["aggregator-authority.pem", "theriac-edge join"]);

    // Nothing of that was lasting.
    fs::write(&authority, kept).unwrap();
    edge.start();
    let session = runtime.block_on(centre.welcome(None));
    edge.until_connected();
    edge.stop();
    drop(session);
}

#[test]
fn a_clock_that_is_wrong_is_named_as_the_cause() {
    let root = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    let centre = runtime.block_on(async { Played::new() });
    let mut edge = Edge::new(root.path(), "press-1", "");
    let now = SystemTime::now();
    // A certificate from a time that has not come, and one from a time that is over.
    for not_before in [
        now + Duration::from_hours(24),
        now - Duration::from_hours(24 * 365),
    ] {
        let validity = Validity {
            not_before,
            not_after: not_before + Duration::from_hours(48),
        };
        let identity = centre
            .edges()
            .issue(&"press-1".parse().unwrap(), &[], validity)
            .unwrap();
        centre.enlist_as(&edge, &identity);
        let status = stays_alone(&mut edge, &["certificate", "check the clocks of both hosts"]);
        assert!(status.rows > 0);
        let doctor = edge.run(&["doctor"]).expect_code(1);
        assert!(doctor.stdout.contains("clock"), "{}", doctor.stdout);
    }
}
