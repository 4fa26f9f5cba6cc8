//! An edge whose state directory is an old copy, and the fleet's floor, over the wire.

use std::fs;
use std::path::Path;

use theriac_edge::status::Federation;
use theriac_privacy::ledger::{Ledger, ReleasePlan, Reserved};
use theriac_privacy::policy::Policy;
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{L2Norm, NoiseMultiplier, Round, Timestamp};

use crate::fleet::{Centre, Edge, moments};

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    // A state directory that others can read is not taken.
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Charges of a life that the aggregator has never seen: the restored copy is longer than what was signed, and not the same.
fn grow(root: &Path, edge: &Edge) {
    let policy = Policy::load(&root.join("press-1.privacy.toml")).unwrap();
    let (node, block_span) = (policy.site().clone(), policy.block_span());
    let mut ledger = Ledger::open(&edge.dir.join("ledger.log"), &node, policy, Timestamp(1)).unwrap();
    for round in 0..8 {
        let plan = ReleasePlan {
            round: Round(1_000_000 + round),
            nonce: 1,
            kind: UpdateKind::Moments,
            values: 4,
            block_span,
            blocks: vec![round],
            windows: None,
            sampling_rate: 1.0,
            steps: 1,
            clip_norm: L2Norm::new(1.0).unwrap(),
            noise_multiplier: NoiseMultiplier::new(2.0).unwrap(),
        };
        assert!(matches!(
            ledger.reserve(plan, Timestamp(1)).unwrap(),
            Reserved::Fresh(_)
        ));
    }
}

/// A round is open when the restored edge comes back, and its Welcome says so: still nothing is charged before the seal was read.
#[test]
fn a_restored_copy_that_has_grown_is_refused_by_the_seal_before_anything_is_charged() {
    let root = tempfile::tempdir().unwrap();
    let rounds = "quorum = 1\nrule = \"mean\"\nbyzantine = 0\ndeadline = \"6s\"\npause = \"0s\"";
    let mut centre = Centre::init(root.path(), &moments(rounds));
    centre.serve();
    let mut edge = Edge::new(root.path(), "press-1", "");
    let mut other = Edge::on(root.path(), "press-2", root.path(), "receive_only = true", "");
    for edge in [&edge, &other] {
        edge.enrol(&centre);
    }
    // The backup: a ledger is begun and nothing is charged, since no aggregator is there.
    centre.stop();
    edge.start();
    edge.until_rows(35);
    edge.stop();
    let backup = root.path().join("backup");
    copy(&edge.dir, &backup);
    centre.serve();
    edge.start();
    edge.until("a receipt", |status| status.updates_accepted >= 1);
    centre.until("a sealed ledger", |status| {
        status.sites.iter().any(|site| site.ledger_records > 0)
    });
    edge.stop();

    fs::remove_dir_all(&edge.dir).unwrap();
    copy(&backup, &edge.dir);
    grow(root.path(), &edge);
    // A round stays open, because the only site that is there declines.
    other.start();
    let open = centre.until("an open round", |status| status.phase == "collecting");
    edge.start();
    edge.until("the refusal", |status| {
        let said = status.federation_detail.as_deref().unwrap_or_default();
        status.federation == Federation::Off && said.contains("TH-E0309")
    });
    edge.stop();
    other.stop();
    let policy = Policy::load(&root.path().join("press-1.privacy.toml")).unwrap();
    let charged = Ledger::inspect(&edge.dir.join("ledger.log"), policy)
        .unwrap()
        .releases;
    assert_eq!(
        charged, 8,
        "something was charged by a ledger that the seal refuses"
    );
    println!("round {} was open", open.round);
    centre.stop();
}

/// `[privacy_floor]` over the wire: the update is refused and on record, nothing is published; with a floor that the site meets it is taken.
#[test]
fn an_update_below_the_floor_is_refused_and_on_record() {
    let root = tempfile::tempdir().unwrap();
    let rounds = moments("quorum = 1\nrule = \"mean\"\nbyzantine = 0\ndeadline = \"6s\"\npause = \"0s\"");
    let floor = |most: &str| format!("{rounds}\n[privacy_floor]\nunit = \"block\"\nepsilon_max = {most}\n");
    let mut centre = Centre::init(root.path(), &floor("1.0"));
    centre.serve();
    let mut edge = Edge::new(root.path(), "press-1", "");
    edge.enrol(&centre);
    edge.start();
    let refused = centre.until("the refusal on record", |status| {
        let site = status.sites.iter().find(|site| site.name == "press-1");
        site.is_some_and(|site| site.refusals.contains_key("privacy_too_weak"))
    });
    assert_eq!((refused.rounds_published, refused.model_version), (0, 0));
    edge.until("word of it", |status| {
        status.last_refusal.as_deref() == Some("privacy_too_weak")
    });
    centre.stop();
    // The edges' policy of these tests promises ε = 8.
    centre.configure(&floor("8.0"));
    centre.serve();
    centre.until("a published model", |status| status.rounds_published > 0);
    edge.stop();
    centre.stop();
}
