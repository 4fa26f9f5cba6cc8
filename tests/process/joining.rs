//! Enrolment that goes wrong.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use theriac_certs::{Authority, Identity, JoinToken, Role, trust};
use theriac_protocol::message::JoinReplyV1;
use theriac_transport::Limits;
use theriac_transport::join::JoinListener;
use tokio::runtime::Runtime;

use crate::child::{free_address, until};
use crate::fleet::{Centre, Edge};

fn serving(root: &std::path::Path) -> Centre {
    let mut centre = Centre::init(root, "[rounds]\nquorum = 3\n");
    centre.serve();
    centre
}

#[test]
fn a_token_is_good_once_in_time_and_for_one_key() {
    let root = tempfile::tempdir().unwrap();
    let mut centre = serving(root.path());
    let made = |name| Edge::new(root.path(), name, "");

    let late = made("press-2");
    let token = centre.token("press-2", "1s");
    std::thread::sleep(Duration::from_millis(1_100));
    late.join(&centre, &token)
        .expect_problem(1, &["TH-E0311", "expired", "token create", "clock"]);

    let first = made("press-3");
    let token = centre.token("press-3", "1h");
    first.join(&centre, &token).expect_done();
    // The same command again on the same host changes nothing; another host's key is another matter.
    first.join(&centre, &token).expect_done();
    let thief = Edge::new(&root.path().join("press-3"), "press-3", "");
    thief.join(&centre, &token).expect_problem(
        1,
        &["TH-E0311", "already used, with another key", "revoke that site"],
    );
    assert!(!thief.dir.join("join.json").exists());
    let sites = centre
        .run(&["sites", "list", "--format", "json"])
        .expect_done()
        .json();
    assert_eq!(sites.as_array().unwrap().len(), 1, "{sites}");

    let odd = made("press-4");
    odd.join(&centre, "thrc1_AAAA")
        .expect_problem(2, &["TH-E0312", "token create"]);
    let foreign = JoinToken::generate([7; 32]).unwrap().to_string();
    odd.join(&centre, &foreign)
        .expect_problem(75, &["TH-E0310", "clock", "the same token may be used again"]);
    // The failed attempts have not spoilt the state: a good token enrols the same directory.
    odd.join(&centre, &centre.token("press-4", "1h")).expect_done();
    centre.stop();
}

#[test]
fn nobody_at_the_join_address_is_told_with_what_to_check() {
    let root = tempfile::tempdir().unwrap();
    let edge = Edge::new(root.path(), "press-1", "");
    let token = JoinToken::generate([7; 32]).unwrap().to_string();
    let nobody = free_address().to_string();
    edge.run(&["join", "--aggregator", &nobody, "--token", &token])
        .expect_problem(
            75,
            &["TH-E0310", &nobody, "UDP", "the same token may be used again"],
        );
}

/// An edge whose own clock is behind gets its certificate, and hears why it cannot use it yet.
#[test]
fn joining_with_a_clock_that_is_behind_names_the_clock() {
    let root = tempfile::tempdir().unwrap();
    let runtime = Runtime::new().unwrap();
    let now = SystemTime::now();
    let aggregators = Authority::generate("plant", Role::Aggregator, now).unwrap();
    let edges = Authority::generate("plant", Role::Edge, now).unwrap();
    let own: Identity = aggregators
        .issue_aggregator(&"main".parse().unwrap(), &["127.0.0.1".to_owned()])
        .unwrap();
    let token = JoinToken::generate(aggregators.fingerprint()).unwrap();
    let address: SocketAddr = runtime.block_on(async {
        let tls = trust::join_server_config(&own).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = JoinListener::bind(any, tls, &Limits::default()).unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(listener.serve(move |request, _| {
            let node = "press-1".parse().unwrap();
            let from = now + Duration::from_hours(24);
            let certificate = edges
                .sign_csr(&request.csr, &node, from, Duration::from_hours(48))
                .unwrap();
            let reply = JoinReplyV1::Enrolled {
                node,
                federation: "plant".to_owned(),
                aggregator: "127.0.0.1:1".to_owned(),
                certificate,
                edge_authority: edges.certificate_der().to_vec(),
                aggregator_authority: aggregators.certificate_der().to_vec(),
            };
            async move { reply }
        }));
        address
    });
    let edge = Edge::new(root.path(), "press-1", "");
    let words = [
        "join",
        "--aggregator",
        &address.to_string(),
        "--token",
        &token.to_string(),
    ];
    edge.run(&words).expect_problem(
        1,
        &["TH-E0314", "set the clock", "nothing has to be joined again"],
    );
    assert!(edge.dir.join("join.json").exists(), "it is joined all the same");
}

/// Peers that knock and then say nothing, or half a request, hold nobody up.
#[test]
fn peers_that_stop_half_way_do_not_hold_the_next_one_up() {
    let root = tempfile::tempdir().unwrap();
    let mut centre = serving(root.path());
    let runtime = Runtime::new().unwrap();
    let fingerprint = Authority::load(&centre.dir.join("authority/aggregators"))
        .unwrap()
        .fingerprint();
    let mut held = Vec::new();
    let tls = trust::join_client_config(fingerprint).unwrap();
    runtime.block_on(async {
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
        let config = quinn::ClientConfig::new(std::sync::Arc::new(crypto));
        let endpoint = quinn::Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        for half in 0..20_usize {
            let connecting = endpoint
                .connect_with(config.clone(), centre.join, "127.0.0.1")
                .unwrap();
            let connection = connecting.await.unwrap();
            let (mut send, receive) = connection.open_bi().await.unwrap();
            // A frame header of a join request of 1000 bytes, and at most a part of it.
            let mut bytes = b"THRC\x01\x01\x40\x00\xe8\x03\x00\x00".to_vec();
            bytes.extend(vec![0; 30 * half]);
            send.write_all(&bytes[..bytes.len().min(6 + 40 * half)])
                .await
                .unwrap();
            held.push((connection, send, receive));
        }
        held.push({
            let connection = endpoint
                .connect_with(config.clone(), centre.join, "127.0.0.1")
                .unwrap()
                .await
                .unwrap();
            let (send, receive) = connection.open_bi().await.unwrap();
            (connection, send, receive)
        });
    });
    let late = Edge::new(root.path(), "press-2", "");
    let token = centre.token("press-2", "1h");
    late.join(&centre, &token).expect_done();
    assert!(
        held.iter()
            .all(|(connection, ..)| connection.close_reason().is_none()),
        "it had to wait until they were cut off"
    );
    // Each of them is cut off in time.
    until("the end of every half-open enrolment", || {
        held.iter()
            .all(|(connection, ..)| connection.close_reason().is_some())
            .then_some(())
    });
    let sites = centre
        .run(&["sites", "list", "--format", "json"])
        .expect_done()
        .json();
    assert_eq!(sites.as_array().unwrap().len(), 1, "{sites}");
    centre.stop();
}

/// A disk that is full, or a directory that cannot be written, while the answer is being kept: the token stays good.
#[test]
fn an_answer_that_could_not_be_kept_is_asked_for_again() {
    let root = tempfile::tempdir().unwrap();
    let mut centre = serving(root.path());
    let edge = Edge::new(root.path(), "press-2", "");
    let token = centre.token("press-2", "1h");
    // Something stands where `join.json` is written before it is renamed.
    fs::create_dir_all(edge.dir.join("join.tmp")).unwrap();
    fs::set_permissions(&edge.dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    edge.join(&centre, &token)
        .expect_problem(1, &["TH-E0313", "the token stays good for this key"]);
    assert!(!edge.dir.join("join.json").exists());
    fs::remove_dir(edge.dir.join("join.tmp")).unwrap();
    edge.join(&centre, &token).expect_done();
    centre.stop();
}
