//! A report is held to its records: every figure is recomputed, and a changed, removed, reordered or added record is found.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use theriac_privacy::ledger::{KnownHead, Ledger, ReleasePlan, Reserved, Seal};
use theriac_privacy::policy::Policy;
use theriac_privacy::policy::signed::{PolicyKey, signature_path};
use theriac_privacy::report::{SealCheck, Trust, Verified, VerifyError, page, verify};
use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::{Digest, L2Norm, NodeId, NoiseMultiplier, Round, Timestamp};

const RECORDS_SEALED: u64 = 6;

struct Place {
    folder: tempfile::TempDir,
    policy: Policy,
    known: KnownHead,
}

fn officer() -> PolicyKey {
    PolicyKey::from_seed(&[9; 32])
}

fn policy(folder: &Path) -> Policy {
    let path = folder.join("privacy.toml");
    let text = "version = 2\nsite = \"site-a\"\nepsilon = 4.0\nblock_releases_max = 2\n";
    std::fs::write(&path, text).unwrap();
    std::fs::write(signature_path(&path), officer().sign(text).unwrap().to_string()).unwrap();
    Policy::load_signed(&path, officer().public()).unwrap()
}

fn release(ledger: &mut Ledger, round: u64, blocks: &[u64]) {
    let plan = ReleasePlan {
        round: Round(round),
        nonce: round,
        kind: UpdateKind::Moments,
        values: 4,
        block_span: Duration::from_hours(1),
        blocks: blocks.to_vec(),
        sampling_rate: 1.0,
        steps: 1,
        clip_norm: L2Norm::new(1.0).unwrap(),
        noise_multiplier: NoiseMultiplier::new(2.0).unwrap(),
    };
    let Reserved::Fresh(reservation) = ledger.reserve(plan, Timestamp(round)).unwrap() else {
        panic!("charged before")
    };
    let payload = Digest::of(&round.to_le_bytes());
    ledger
        .mark_released(reservation.id(), payload, Timestamp(round))
        .unwrap();
}

/// Genesis, policy, two charges with their releases, a counter-signature, one more charge and release.
fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let policy = policy(folder.path());
    let mut ledger = Ledger::open(&path(&folder), policy.site(), policy.clone(), Timestamp(1)).unwrap();
    release(&mut ledger, 1, &[10, 11]);
    release(&mut ledger, 2, &[11, 12, 20]);
    let known = ledger.known_head();
    assert_eq!(known.records, RECORDS_SEALED);
    ledger.keep_seal(seal(known)).unwrap();
    release(&mut ledger, 3, &[30]);
    let known = ledger.known_head();
    Place {
        folder,
        policy,
        known,
    }
}

fn path(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("ledger.log")
}

fn seal(known: KnownHead) -> Seal {
    Seal {
        records: known.records,
        head: known.head,
        signed: Timestamp(5),
        key: "theriac/test+01234567+AAAA".to_owned(),
        signature: "ab".repeat(64),
    }
}

impl Place {
    fn report(&self) -> Value {
        let known = Some(&self.known);
        let document = Ledger::report(&path(&self.folder), &self.policy, known, Timestamp(9)).unwrap();
        serde_json::to_value(document).unwrap()
    }
}

fn check(report: &Value) -> Result<Verified, VerifyError> {
    check_with(report, None, SealCheck::Trusted)
}

fn check_with(report: &Value, known: Option<KnownHead>, seals: SealCheck) -> Result<Verified, VerifyError> {
    let judged = |_: &Seal, _: &NodeId| seals;
    let trust = Trust {
        policy_key: Some(officer().public()),
        known,
        seals: &judged,
    };
    verify(&serde_json::to_string_pretty(report).unwrap(), &trust)
}

fn count(records: u64) -> usize {
    usize::try_from(records).unwrap()
}

fn records(report: &mut Value) -> &mut Vec<Value> {
    report["records"].as_array_mut().unwrap()
}

/// What a forger does who knows the format: all heads anew, and the statement to match.
fn with_new_heads(report: &mut Value) {
    let mut head: [u8; 32] = Sha256::digest([b"THRCLEDG".as_slice(), &2_u32.to_le_bytes()].concat()).into();
    for record in records(report) {
        let body = record["body"].as_str().unwrap().as_bytes().to_vec();
        let hash = Sha256::new()
            .chain_update(b"theriac ledger v1\n")
            .chain_update(head)
            .chain_update((body.len() as u64).to_le_bytes())
            .chain_update(body);
        head = hash.finalize().into();
        record["head"] = Value::from(Digest(head).to_string());
    }
    let (head, records) = (Digest(head).to_string(), records(report).len());
    report["statement"]["ledger_head"] = Value::from(head);
    report["statement"]["ledger_records"] = Value::from(records);
}

#[test]
fn a_true_report_verifies_to_the_last_digit() {
    let place = place();
    let report = place.report();
    let verified = check_with(&report, Some(place.known), SealCheck::Trusted).unwrap();
    assert_eq!((verified.releases, verified.records), (3, place.known.records));
    assert_eq!(verified.sealed_records, RECORDS_SEALED);
    assert!(verified.policy_trusted && verified.seals_trusted);
    let stated = report["statement"]["epsilon_spent"].as_f64().unwrap();
    assert!(
        stated > 2.0 && verified.epsilon.to_bits() == stated.to_bits(),
        "{stated}"
    );
    // Blocks 10, 11, 12, 20, 30: block 11 was read twice.
    assert_eq!(report["blocks"].as_array().unwrap().len(), 5);
}

#[test]
fn every_changed_figure_is_found() {
    let place = place();
    let report = place.report();
    let names: Vec<String> = report["statement"].as_object().unwrap().keys().cloned().collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let mut changed = report.clone();
        changed["statement"][&name] = match &report["statement"][&name] {
            Value::Number(number) => {
                json!(number.as_f64().unwrap() + 1e-9 + f64::from(u8::from(number.is_u64())))
            }
            Value::String(text) => json!(format!("{text}x")),
            Value::Bool(yes) => json!(!yes),
            _ => json!(1),
        };
        let found = check(&changed);
        assert!(
            matches!(&found, Err(VerifyError::Figure { figure, .. }) if *figure == name),
            "{name}: {found:?}"
        );
    }
    let mut changed = report.clone();
    changed["blocks"][0]["epsilon"] = json!(0.1);
    assert!(matches!(check(&changed), Err(VerifyError::Figure { .. })));
    let mut changed = report.clone();
    changed["assumptions"][0] = json!("trust us");
    assert!(matches!(check(&changed), Err(VerifyError::Figure { .. })));
    let mut changed = report;
    changed["statement"]
        .as_object_mut()
        .unwrap()
        .remove("epsilon_lifetime");
    assert!(matches!(check(&changed), Err(VerifyError::Format(_))));
}

#[test]
fn a_changed_record_is_found() {
    let place = place();
    let report = place.report();
    let last = count(place.known.records);
    for index in 0..last {
        let mut changed = report.clone();
        let body = changed["records"][index]["body"].as_str().unwrap().to_owned();
        // A later time changes no figure at all.
        let cut = body.rfind("\"at\":").or(body.rfind("\"signed\":")).unwrap();
        let at = cut + body[cut..].find(':').unwrap() + 1;
        let body = format!("{}9{}", &body[..at], &body[at..]);
        changed["records"][index]["body"] = json!(body);
        let found = check(&changed);
        assert!(
            matches!(found, Err(VerifyError::Record { index: at, .. }) if at == index),
            "record {index}: {found:?}"
        );
        with_new_heads(&mut changed);
        let found = check_with(&changed, Some(place.known), SealCheck::Trusted);
        assert!(found.is_err(), "record {index}, all heads anew");
        if index < count(RECORDS_SEALED) {
            let found = check(&changed);
            assert!(
                matches!(found, Err(VerifyError::Seal { .. })),
                "record {index}: {found:?}"
            );
        }
    }
}

#[test]
fn a_cheaper_charge_is_found_even_with_all_heads_anew() {
    let place = place();
    let mut changed = place.report();
    let body = changed["records"][2]["body"].as_str().unwrap().to_owned();
    let cheaper = body.replace("\"noise_multiplier\":2.0", "\"noise_multiplier\":4.0");
    assert_ne!(body, cheaper);
    changed["records"][2]["body"] = json!(cheaper);
    with_new_heads(&mut changed);
    assert!(matches!(
        check(&changed),
        Err(VerifyError::Record { index: 2, .. })
    ));
}

#[test]
fn a_removed_record_is_found() {
    let place = place();
    let report = place.report();
    for index in 0..count(place.known.records) {
        let mut changed = report.clone();
        records(&mut changed).remove(index);
        assert!(check(&changed).is_err(), "record {index}");
        with_new_heads(&mut changed);
        let found = check_with(&changed, Some(place.known), SealCheck::Trusted);
        assert!(found.is_err(), "record {index}, all heads anew");
    }
}

#[test]
fn reordered_records_are_found() {
    let place = place();
    let report = place.report();
    for index in 1..count(place.known.records) {
        let mut changed = report.clone();
        records(&mut changed).swap(index - 1, index);
        assert!(check(&changed).is_err(), "records {index} and the one before");
        with_new_heads(&mut changed);
        let found = check_with(&changed, Some(place.known), SealCheck::Trusted);
        assert!(
            found.is_err(),
            "records {index} and the one before, all heads anew"
        );
    }
}

#[test]
fn an_added_record_is_found() {
    let place = place();
    let report = place.report();
    for index in 0..=count(place.known.records) {
        for copied in 0..count(place.known.records) {
            let mut changed = report.clone();
            let copy = changed["records"][copied].clone();
            records(&mut changed).insert(index, copy);
            assert!(check(&changed).is_err(), "record {copied} again at {index}");
            with_new_heads(&mut changed);
            // A copy at the end moves nothing that is known; it must fail on its own.
            let found = check_with(&changed, Some(place.known), SealCheck::Trusted);
            assert!(found.is_err(), "record {copied} again at {index}, all heads anew");
        }
    }
}

#[test]
fn a_cut_off_end_is_found_by_the_counter_signature_or_by_what_is_known() {
    let place = place();
    let mut cut = place.report();
    records(&mut cut).truncate(count(RECORDS_SEALED));
    with_new_heads(&mut cut);
    let known = check_with(&cut, Some(place.known), SealCheck::Trusted);
    assert!(matches!(known, Err(VerifyError::Behind { records, .. }) if records == place.known.records));
}

#[test]
fn wrong_signatures_are_found() {
    let place = place();
    let report = place.report();
    let found = check_with(&report, None, SealCheck::Wrong);
    assert!(
        matches!(
            found,
            Err(VerifyError::Seal {
                records: RECORDS_SEALED,
                ..
            })
        ),
        "{found:?}"
    );
    let judged = |_: &Seal, _: &NodeId| SealCheck::Consistent;
    let trust = Trust {
        policy_key: Some(PolicyKey::from_seed(&[1; 32]).public()),
        known: None,
        seals: &judged,
    };
    let found = verify(&report.to_string(), &trust);
    assert!(
        matches!(found, Err(VerifyError::Policy { index: 1, .. })),
        "{found:?}"
    );
}

#[test]
fn what_is_no_report_is_an_error_that_says_so() {
    let place = place();
    for bad in [json!({}), json!([]), json!("x")] {
        assert!(matches!(check(&bad), Err(VerifyError::Format(_))));
    }
    let mut other = place.report();
    other["format"] = json!("theriac privacy report v9");
    assert!(matches!(check(&other), Err(VerifyError::Format(_))));
    let mut more = place.report();
    more["extra"] = json!(1);
    assert!(matches!(check(&more), Err(VerifyError::Format(_))));
}

#[test]
fn the_page_says_the_statement_and_fetches_nothing() {
    let place = place();
    let document = Ledger::report(&path(&place.folder), &place.policy, None, Timestamp(9)).unwrap();
    let html = page(&document).unwrap();
    for said in [
        "site-a",
        "each block of 1h",
        "δ = 1e-6",
        &officer().public().to_string(),
        "privacy verify",
    ] {
        assert!(html.contains(said), "the page does not say {said}");
    }
    for fetched in ["http://", "https://", "<script", "@import", "url("] {
        assert!(!html.contains(fetched), "the page holds {fetched}");
    }
}

/// The same meaning, signed anew: the record in the ledger follows, so that the report names the signer that is in force.
#[test]
fn a_policy_that_is_signed_anew_is_recorded_anew() {
    let place = place();
    let other = PolicyKey::from_seed(&[3; 32]);
    let at = place.folder.path().join("privacy.toml");
    let text = std::fs::read_to_string(&at).unwrap();
    std::fs::write(signature_path(&at), other.sign(&text).unwrap().to_string()).unwrap();
    let policy = Policy::load_signed(&at, other.public()).unwrap();
    let known = Some(&place.known);
    assert!(
        Ledger::report(&path(&place.folder), &policy, known, Timestamp(9)).is_err(),
        "the ledger does not know of it yet"
    );
    let node = policy.site().clone();
    drop(Ledger::open(&path(&place.folder), &node, policy.clone(), Timestamp(9)).unwrap());
    let document = Ledger::report(&path(&place.folder), &policy, known, Timestamp(9)).unwrap();
    assert_eq!(document.statement["policy_signer"], other.public().to_string());
    assert_eq!(document.records.len() as u64, place.known.records + 1);
}
