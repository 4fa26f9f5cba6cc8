//! A report is held to its records: every figure is recomputed, and a changed, removed, reordered or added record is found.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use theriac_privacy::ledger::{KnownHead, Ledger, ReleasePlan, Reserved, Seal};
use theriac_privacy::policy::Policy;
use theriac_privacy::policy::signed::{PolicyKey, PolicyPublicKey, signature_path};
use theriac_privacy::report::{Document, SealCheck, Trust, Verified, VerifyError, page, verify};
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
        windows: None,
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

/// As a forger would: the digest is that of the changed report.
fn check_with(report: &Value, known: Option<KnownHead>, seals: SealCheck) -> Result<Verified, VerifyError> {
    let mut report = report.clone();
    with_new_digest(&mut report);
    check_as_it_is(&report, known, seals, None)
}

fn check_as_it_is(
    report: &Value,
    known: Option<KnownHead>,
    seals: SealCheck,
    edge_key: Option<PolicyPublicKey>,
) -> Result<Verified, VerifyError> {
    let judged = |_: &Seal, _: &NodeId| seals;
    let trust = Trust {
        policy_key: Some(officer().public()),
        edge_key,
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

/// Changes the text of one record, and all heads.
fn forged(report: &Value, record: usize, from: &str, to: &str) -> Value {
    let mut report = report.clone();
    let body = records(&mut report)[record]["body"].as_str().unwrap().to_owned();
    assert!(body.contains(from), "{body}");
    records(&mut report)[record]["body"] = Value::from(body.replace(from, to));
    with_new_heads(&mut report);
    report
}

/// Whoever builds a ledger can make all its heads fit; what it promises must still be what it counts.
#[test]
fn a_ledger_that_does_not_keep_the_policy_that_it_reports_is_found() {
    let place = place();
    let report = place.report();
    for (record, from, to, told) in [
        (0, "3600000", "60000", "3600000 ms"),
        (0, "\"unit\":\"block\"", "\"unit\":\"record\"", "another unit"),
        (0, "site-a", "site-b", "site-b"),
        (1, "\"period\":\"rolling\"", "\"period\":\"month\"", "period"),
        (1, "\"epsilon\":4.0,", "\"epsilon\":40.0,", "epsilon"),
        (1, "\"delta\":1e-6", "\"delta\":1e-9", "delta"),
        (1, "\"version\":2", "\"version\":3", "version"),
        (2, "\"period\":0", "\"period\":1", "another period"),
    ] {
        let found = check(&forged(&report, record, from, to));
        let message = found.unwrap_err().to_string();
        assert!(message.contains(told), "{from} → {to}: {message}");
    }
}

/// A policy that the same key has signed and that allows less: every charge beyond it is found.
#[test]
fn a_charge_beyond_the_policy_in_force_is_found() {
    let place = place();
    let report = place.report();
    let (text, old) = (place.policy.text().to_owned(), place.policy.hash().to_string());
    for (from, to, told) in [
        ("epsilon = 4.0", "epsilon = 2.0", "2"),
        ("block_releases_max = 2\n", "block_releases_max = 1\n", "11"),
        (
            "epsilon = 4.0\n",
            "epsilon = 4.0\nnoise_multiplier_min = 2.5\n",
            "2.5",
        ),
        (
            "epsilon = 4.0\n",
            "epsilon = 4.0\nmechanisms = [\"delta\"]\n",
            "oment",
        ),
        (
            "epsilon = 4.0\n",
            "epsilon = 4.0\nreleases_max = 2\n",
            "2 releases",
        ),
    ] {
        let stricter = text.replace(from, to);
        let policy = Policy::parse(&stricter).unwrap();
        let mut forged = report.clone();
        for record in records(&mut forged) {
            let body = record["body"]
                .as_str()
                .unwrap()
                .replace(&old, &policy.hash().to_string());
            let mut body: Value = serde_json::from_str(&body).unwrap();
            if body["record"] == json!("policy") {
                body["text"] = json!(stricter);
                body["epsilon"] = json!(policy.epsilon().value());
                body["signature"] = json!(officer().sign(&stricter).unwrap().to_string());
            }
            record["body"] = Value::from(body.to_string());
        }
        with_new_heads(&mut forged);
        let message = check(&forged).unwrap_err().to_string();
        assert!(
            message.contains("beyond the policy") && message.contains(told),
            "{to}: {message}"
        );
    }
}

/// The text of a policy with its records' bodies under it: what its own hash, limit and signature are.
fn under(body: &str, old: &Policy, text: &str) -> Value {
    let policy = Policy::parse(text).unwrap();
    let body = body.replace(&old.hash().to_string(), &policy.hash().to_string());
    let mut body: Value = serde_json::from_str(&body).unwrap();
    if body["record"] == json!("policy") {
        body["text"] = json!(text);
        body["epsilon"] = json!(policy.epsilon().value());
        body["signature"] = json!(officer().sign(text).unwrap().to_string());
    }
    body
}

/// A policy without its text first, its text, truly signed, after everything was charged: each charge is held to it all the same. With no text at all nothing is taken.
#[test]
fn a_policy_whose_text_comes_last_holds_for_the_charges_before_it() {
    let place = place();
    let mut forged = place.report();
    let stricter = place.policy.text().replace("epsilon = 4.0", "epsilon = 2.0");
    let mut note = Value::Null;
    for record in records(&mut forged) {
        let mut body = under(record["body"].as_str().unwrap(), &place.policy, &stricter);
        if body["record"] == json!("policy") {
            note = body.clone();
            let body = body.as_object_mut().unwrap();
            body.remove("text");
            body.remove("signature");
        }
        record["body"] = Value::from(body.to_string());
    }
    with_new_heads(&mut forged);
    let message = check(&forged).unwrap_err().to_string();
    assert!(message.contains("whose text no record holds"), "{message}");
    records(&mut forged).push(json!({ "body": note.to_string(), "head": "" }));
    with_new_heads(&mut forged);
    let message = check(&forged).unwrap_err().to_string();
    assert!(
        message.contains("beyond the policy") && message.contains('2'),
        "{message}"
    );
}

/// Charges in the form of the first format are held to the policy as all others are; only where no record holds its text they are not, and that is said.
#[test]
fn charges_of_the_first_format_are_held_to_the_policy() {
    let place = place();
    let first_format = |text: &str, with_text: bool| {
        let mut forged = place.report();
        records(&mut forged).retain(|record| !record["body"].as_str().unwrap().contains("\"sealed\""));
        for record in records(&mut forged) {
            let mut body = under(record["body"].as_str().unwrap(), &place.policy, text);
            let object = body.as_object_mut().unwrap();
            if object["record"] == json!("charge") {
                for name in [
                    "sequence",
                    "unit",
                    "sampling_rate",
                    "steps",
                    "rdp",
                    "period",
                    "salt",
                ] {
                    object.remove(name);
                }
                object.insert("record".to_owned(), json!("reserve"));
                object.insert("rho".to_owned(), json!(0.125 * (1.0 + 1e-6)));
            } else if object["record"] == json!("policy") && !with_text {
                object.remove("text");
                object.remove("signature");
            }
            record["body"] = Value::from(body.to_string());
        }
        forged
    };
    let strict = place.policy.text().replace("epsilon = 4.0", "epsilon = 2.0");
    let mut forged = first_format(&strict, true);
    with_new_heads(&mut forged);
    let message = check(&forged).unwrap_err().to_string();
    assert!(
        message.contains("beyond the policy") && message.contains('2'),
        "{message}"
    );
    // Within the policy it is a ledger as an old build wrote it, but for the version in its header.
    let mut plain = first_format(place.policy.text(), true);
    with_new_heads(&mut plain);
    let found = check(&plain);
    assert!(
        !matches!(
            found,
            Err(VerifyError::Record { .. } | VerifyError::Policy { .. })
        ),
        "{found:?}"
    );
    // The text of another policy comes later: what was charged before is counted, and told apart.
    let mut old = first_format(&strict, false);
    let mut later = under(
        place.report()["records"][1]["body"].as_str().unwrap(),
        &place.policy,
        place.policy.text(),
    );
    later["version"] = json!(2);
    records(&mut old).push(json!({ "body": later.to_string(), "head": "" }));
    with_new_heads(&mut old);
    let figures = |old: &mut Value| loop {
        // Every figure as the verifier recomputes it.
        match check(old) {
            Err(VerifyError::Figure {
                figure, recomputed, ..
            }) => {
                let recomputed: Value = serde_json::from_str(&recomputed).unwrap();
                if old["statement"].get(&figure).is_some() {
                    old["statement"][&figure] = recomputed;
                } else {
                    old[&figure] = recomputed;
                }
            }
            other => return other,
        }
    };
    let verified = figures(&mut old).unwrap();
    assert_eq!((verified.releases, verified.releases_unheld), (3, 3));
    assert_eq!(figures(&mut plain).unwrap().releases_unheld, 0);
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

/// The digest of the fields as they stand, if they still make a report; a signature is left as it is.
fn with_new_digest(report: &mut Value) {
    let Ok(mut document) = serde_json::from_value::<Document>(report.clone()) else {
        return;
    };
    document.digest = String::new();
    document.signature = None;
    let text = serde_json::to_string(&serde_json::to_value(&document).unwrap()).unwrap();
    let digest = Digest::of(format!("theriac privacy report v2\n{text}").as_bytes());
    report["digest"] = json!(digest.to_string());
}

fn edge_key() -> PolicyKey {
    PolicyKey::from_seed(&[5; 32])
}

/// Every way to change one thing: each value, each character of each text, each name, each element.
fn mutations(value: &Value, path: &str, made: &mut dyn FnMut(&str, Value)) {
    match value {
        Value::Null => made(path, json!(1)),
        Value::Bool(is) => made(path, json!(!is)),
        Value::Number(number) => {
            // A whole number stays one, else its type alone would give it away.
            let other = || json!(number.as_f64().unwrap() * 1.000_001 + 1.0);
            made(path, number.as_u64().map_or_else(other, |whole| json!(whole + 1)));
            made(path, Value::Null);
        }
        Value::String(text) => {
            for at in 0..text.len() {
                let mut bytes = text.clone().into_bytes();
                bytes[at] = if bytes[at] == b'1' { b'2' } else { b'1' };
                if let Ok(changed) = String::from_utf8(bytes) {
                    made(path, json!(changed));
                }
            }
            made(path, json!(format!("{text} ")));
        }
        Value::Array(list) => {
            for (index, element) in list.iter().enumerate() {
                let mut less = list.clone();
                less.remove(index);
                made(path, Value::Array(less));
                let mut more = list.clone();
                more.insert(index, element.clone());
                made(path, Value::Array(more));
                mutations(element, &format!("{path}.{index}"), &mut |at, changed| {
                    let mut list = list.clone();
                    list[index] = changed;
                    made(at, Value::Array(list));
                });
            }
            for index in 1..list.len() {
                let mut swapped = list.clone();
                swapped.swap(index - 1, index);
                if swapped != *list {
                    made(path, Value::Array(swapped));
                }
            }
        }
        Value::Object(object) => {
            let mut more = object.clone();
            more.insert("added".to_owned(), json!(1));
            made(path, Value::Object(more));
            for (name, inner) in object {
                let mut less = object.clone();
                less.remove(name);
                made(&format!("{path}.{name}"), Value::Object(less));
                mutations(inner, &format!("{path}.{name}"), &mut |at, changed| {
                    let mut object = object.clone();
                    object.insert(name.clone(), changed);
                    made(at, Value::Object(object));
                });
            }
        }
    }
}

/// One field at a time, each character of each text: everything is found. Of who computes the digest anew, all but the two fields that nothing vouches for without a
/// signature; with one that the verifier knows, those too.
#[test]
fn every_single_change_of_a_report_is_found() {
    let place = place();
    let unsigned = place.report();
    let document: Document = serde_json::from_value(unsigned.clone()).unwrap();
    let signed = serde_json::to_value(document.signed(&edge_key())).unwrap();
    let (known, key) = (Some(place.known), Some(edge_key().public()));
    assert!(check_as_it_is(&unsigned, known, SealCheck::Trusted, None).is_ok());
    let verified = check_as_it_is(&signed, known, SealCheck::Trusted, key).unwrap();
    assert!(verified.report_trusted && verified.report_signer.is_some());
    assert!(
        check_as_it_is(&unsigned, known, SealCheck::Trusted, key).is_err(),
        "the signature was taken off"
    );
    let (mut changes, mut free) = (0_u32, std::collections::BTreeSet::new());
    let mut number = 0_usize;
    mutations(&unsigned, "", &mut |path, mut changed| {
        number += 1;
        // The curves of the records' bodies are long; every seventh character of them is enough.
        let body = path.split('.').next_back() == Some("body");
        // No signature at all and one that is `null` say the same.
        let unsigned_anyway = changed.get("signature").is_none();
        if body && !number.is_multiple_of(7) || unsigned_anyway || changed == unsigned {
            return;
        }
        changes += 1;
        let found = check_as_it_is(&changed, known, SealCheck::Trusted, None);
        assert!(found.is_err(), "{path} was changed: {found:?}");
        with_new_digest(&mut changed);
        if changed != unsigned && check_as_it_is(&changed, known, SealCheck::Trusted, None).is_ok() {
            free.insert(path.to_owned());
        }
        if ["", ".made", ".software"].contains(&path) {
            changed["signature"] = signed["signature"].clone();
            let found = check_as_it_is(&changed, known, SealCheck::Trusted, key);
            assert!(found.is_err(), "{path} was changed under a signature: {found:?}");
        }
    });
    assert!(changes > 2_000, "{changes}");
    assert_eq!(free.into_iter().collect::<Vec<_>>(), [".made", ".software"]);
    mutations(&signed["signature"], ".signature", &mut |_, changed| {
        let mut report = signed.clone();
        report["signature"] = changed;
        let found = check_as_it_is(&report, known, SealCheck::Trusted, key);
        assert!(found.is_err(), "{}: {found:?}", report["signature"]);
    });
}

/// A name twice is read as its last by some and as its first by others.
#[test]
fn a_name_that_is_there_twice_is_found() {
    let place = place();
    let text = serde_json::to_string(&place.report()).unwrap();
    let twice = text.replacen(
        "\"epsilon_spent\":",
        "\"epsilon_spent\":0.0,\"epsilon_spent\":",
        1,
    );
    assert_ne!(text, twice);
    let judged = |_: &Seal, _: &NodeId| SealCheck::Trusted;
    let trust = Trust {
        policy_key: None,
        edge_key: None,
        known: None,
        seals: &judged,
    };
    assert!(verify(&text, &trust).is_ok());
    let found = verify(&twice, &trust);
    assert!(matches!(found, Err(VerifyError::Format(_))), "{found:?}");
}

#[test]
fn the_second_figure_is_in_the_report_and_never_above_the_first() {
    let place = place();
    let report = place.report();
    let figure = |name: &str| report["statement"][name].as_f64().unwrap();
    for name in ["epsilon_spent", "epsilon_unit_lifetime", "epsilon_lifetime"] {
        let (rdp, pld) = (figure(name), figure(&format!("{name}_pld")));
        assert!(pld > 0.8 * rdp && pld <= rdp, "{name}: {pld}, {rdp}");
    }
    let blocks = report["blocks"].as_array().unwrap();
    let most = blocks
        .iter()
        .map(|run| run["epsilon_pld"].as_f64().unwrap())
        .fold(0.0, f64::max);
    assert!(
        (most - figure("epsilon_unit_lifetime_pld")).abs() < 1e-12,
        "{most}"
    );
    let document = Ledger::report(&path(&place.folder), &place.policy, None, Timestamp(9)).unwrap();
    let html = page(&document).unwrap();
    assert!(html.contains("ε by PLD") && html.contains(&format!("{:.4}", figure("epsilon_spent_pld"))));
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
        edge_key: None,
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
        "<h2>Mechanisms</h2>",
        "<td>moments</td>",
        "of these different",
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
