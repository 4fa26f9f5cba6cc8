//! Who gets in: the matrix of bad peers. None of them is ever "connected", none leaves anything behind.

use std::time::{Duration, SystemTime};

use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
use theriac_certs::{Validity, trust};
use theriac_protocol::message::{GoodbyeV1, ToEdge};
use theriac_protocol::refusal::{RefusalCode, RefusalV1};
use theriac_transport::TlsSide::{Peer, Us};
use theriac_transport::{
    CloseCode, ConnectError, Limits, Loss, bind_client, bind_server, common_version, connect,
};

use crate::fleet::{
    Aggregator, FRAME_BYTES_MAX, Federation, PATIENCE, certificate_and_key, expect_alert, forged, hello,
    knock, knock_as, limits, node, until,
};

const DAY: Duration = Duration::from_hours(24);

#[tokio::test]
async fn an_enrolled_edge_is_welcomed_under_the_name_in_its_certificate() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let (session, welcome) = knock(&aggregator, plant.tls(&plant.edge("press-1")))
        .await
        .unwrap();
    assert_eq!(
        (welcome.federation.as_str(), welcome.node),
        ("plant", node("press-1"))
    );
    assert_eq!(welcome.frame_bytes_max, FRAME_BYTES_MAX);
    assert_eq!(
        session.handle().peer_name().unwrap().to_string(),
        "spiffe://plant/aggregator/main"
    );
    assert_eq!(aggregator.welcomed(), 1);
    session.finish().await;
    aggregator.expect_empty().await;
}

#[tokio::test]
async fn refuses_an_edge_of_another_authority() {
    let (plant, other) = (Federation::new(), Federation::new());
    let aggregator = Aggregator::start(&plant, &limits());
    let outcome = knock(&aggregator, plant.tls(&other.edge("press-1"))).await;
    expect_alert(&aggregator, outcome, Peer, 48).await;
}

#[tokio::test]
async fn an_edge_refuses_an_aggregator_of_another_authority() {
    let (plant, other) = (Federation::new(), Federation::new());
    let aggregator = Aggregator::start(&plant, &limits());
    let tls = trust::client_config(&plant.edge("press-1"), other.aggregators.certificate_der()).unwrap();
    expect_alert(&aggregator, knock(&aggregator, tls).await, Us, 48).await;
}

#[tokio::test]
async fn an_edge_refuses_an_aggregator_under_another_host_name() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let outcome = knock_as(
        &aggregator,
        "elsewhere.example",
        plant.tls(&plant.edge("press-1")),
        hello(),
    )
    .await;
    let reason = expect_alert(&aggregator, outcome, Us, 42).await;
    assert!(reason.contains("localhost"), "{reason}");
}

#[tokio::test]
async fn an_edge_refuses_an_aggregator_whose_certificate_has_expired() {
    let plant = Federation::new();
    let validity = Validity::starting(SystemTime::now() - 9 * DAY, DAY);
    let expired = plant
        .aggregators
        .issue(&node("main"), &["localhost".to_owned()], validity)
        .unwrap();
    let tls = trust::server_config(&expired, plant.edges.certificate_der()).unwrap();
    let aggregator = Aggregator::start(&plant, &limits());
    aggregator.endpoint.set_server_tls(tls).unwrap();
    let outcome = knock(&aggregator, plant.tls(&plant.edge("press-1"))).await;
    expect_alert(&aggregator, outcome, Us, 45).await;
}

#[tokio::test]
async fn refuses_an_expired_certificate_and_one_that_is_not_yet_valid() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let now = SystemTime::now();
    for (begin, told) in [(now - 9 * DAY, "expired"), (now + 2 * DAY, "not valid yet")] {
        let identity = plant
            .edges
            .issue(&node("press-1"), &[], Validity::starting(begin, DAY))
            .unwrap();
        let reason = expect_alert(
            &aggregator,
            knock(&aggregator, plant.tls(&identity)).await,
            Peer,
            45,
        )
        .await;
        assert!(reason.contains(told), "{reason}");
    }
}

#[tokio::test]
async fn refuses_a_client_without_a_certificate() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let outcome = knock(&aggregator, plant.tls_with(None, trust::ALPN)).await;
    expect_alert(&aggregator, outcome, Peer, 116).await;
}

#[tokio::test]
async fn refuses_an_aggregators_certificate_used_as_a_client() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let certificate = certificate_and_key(&plant.aggregator());
    let outcome = knock(&aggregator, plant.tls_with(Some(certificate), trust::ALPN)).await;
    expect_alert(&aggregator, outcome, Peer, 43).await;
    // The wrong authority stays wrong under an edge's name and usage.
    let certificate = forged(&plant.aggregators, &["spiffe://plant/edge/press-1"], ClientAuth);
    let outcome = knock(&aggregator, plant.tls_with(Some(certificate), trust::ALPN)).await;
    expect_alert(&aggregator, outcome, Peer, 48).await;
}

#[tokio::test]
async fn refuses_a_server_certificate_even_of_the_authority_of_edges() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let certificate = plant.forged_edge(&["spiffe://plant/edge/press-1"], ServerAuth);
    let outcome = knock(&aggregator, plant.tls_with(Some(certificate), trust::ALPN)).await;
    expect_alert(&aggregator, outcome, Peer, 43).await;
}

#[tokio::test]
async fn refuses_names_that_are_not_exactly_one_edge_of_this_federation() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    for (uris, told) in [
        (
            &["spiffe://plant/edge/press-1", "spiffe://plant/edge/press-2"][..],
            "2 URI names",
        ),
        (&[], "0 URI names"),
        (&["spiffe://plant/aggregator/main"], "for edge is needed"),
        (&["spiffe://other/edge/press-1"], "federation"),
        (&["spiffe://plant/edge/Press 1"], "no node id"),
        (&["https://plant/edge/press-1"], "names no peer"),
    ] {
        let certificate = plant.forged_edge(uris, ClientAuth);
        let outcome = knock(&aggregator, plant.tls_with(Some(certificate), trust::ALPN)).await;
        let reason = expect_alert(&aggregator, outcome, Peer, 46).await;
        assert!(reason.contains(told), "{uris:?}: {reason}");
    }
}

#[tokio::test]
async fn refuses_another_alpn_name() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    for alpn in [trust::ALPN_JOIN, b"theriac/2"] {
        let certificate = certificate_and_key(&plant.edge("press-1"));
        let outcome = knock(&aggregator, plant.tls_with(Some(certificate), alpn)).await;
        expect_alert(&aggregator, outcome, Peer, 120).await;
    }
}

#[tokio::test]
async fn the_registry_turns_away_a_suspended_site_and_a_revoked_key() {
    let plant = Federation::new();
    let refusal = |code| RefusalV1 {
        code,
        round: None,
        retry_after_ms: 0,
    };
    let edge = plant.edge("press-2");
    let revoked = theriac_certs::public_key_fingerprint(edge.certificate_der()).unwrap();
    let aggregator = Aggregator::judging(&plant, &limits(), move |_, name| match name.node.as_str() {
        "press-1" => Err(refusal(RefusalCode::Suspended)),
        "press-2" => Err(refusal(RefusalCode::Revoked)),
        _ => Ok(()),
    });
    assert_ne!(revoked, [0; 32]);
    for (identity, code) in [
        (plant.edge("press-1"), RefusalCode::Suspended),
        (edge, RefusalCode::Revoked),
    ] {
        match knock(&aggregator, plant.tls(&identity)).await {
            Err(error @ ConnectError::Refused(_)) => {
                assert!(matches!(&error, ConnectError::Refused(found) if *found == refusal(code)));
                assert!(error.hint().is_some() && error.needs_a_person());
            }
            other => panic!("expected {code}, got {other:?}"),
        }
    }
    assert_eq!(aggregator.welcomed(), 0);
    aggregator.expect_empty().await;
}

#[tokio::test]
async fn a_suspended_site_is_cut_off_at_once_while_connected() {
    let plant = Federation::new();
    let tls = trust::server_config(&plant.aggregator(), plant.edges.certificate_der()).unwrap();
    let server = bind_server("127.0.0.1:0".parse().unwrap(), tls, &limits()).unwrap();
    let client = bind_client(&limits()).unwrap();
    let tls = plant.tls(&plant.edge("press-1"));
    let dialled = tokio::spawn({
        let (client, addr) = (client.clone(), server.local_addr().unwrap());
        async move { connect(&client, addr, "localhost", tls, hello()).await }
    });
    let mut session = server.accept().await.unwrap();
    session.recv().await.unwrap();
    session.close(CloseCode::Suspended, "suspended by the operator");
    let loss = match dialled.await.unwrap() {
        Err(ConnectError::Lost { loss, .. }) => loss,
        other => panic!("not cut off: {other:?}"),
    };
    let code = Some(CloseCode::Suspended);
    assert_eq!(
        loss,
        Loss::Closed {
            code,
            reason: "suspended by the operator".to_owned()
        }
    );
    assert!(loss.hint().unwrap().contains("operator"));
    assert!(session.recv().await.unwrap_err().is_fatal());
}

#[tokio::test]
async fn no_protocol_version_in_common_is_refused_as_such() {
    let plant = Federation::new();
    let aggregator = Aggregator::judging(&plant, &limits(), |hello, _| {
        let code = RefusalCode::UnsupportedVersion;
        common_version(hello).map(|_| ()).ok_or(RefusalV1 {
            code,
            round: None,
            retry_after_ms: 0,
        })
    });
    let future = theriac_protocol::message::HelloV1 {
        protocol_min: 900,
        protocol_max: 901,
        ..hello()
    };
    let outcome = knock_as(
        &aggregator,
        "localhost",
        plant.tls(&plant.edge("press-1")),
        future,
    )
    .await;
    match outcome {
        Err(ConnectError::Refused(refusal)) => assert_eq!(refusal.code, RefusalCode::UnsupportedVersion),
        other => panic!("expected a refusal, got {other:?}"),
    }
    assert_eq!(aggregator.welcomed(), 0);
    // An edge that speaks ours and newer ones is fine.
    let wide = theriac_protocol::message::HelloV1 {
        protocol_max: 901,
        ..hello()
    };
    knock_as(&aggregator, "localhost", plant.tls(&plant.edge("press-1")), wide)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_server_that_never_welcomes_is_given_up() {
    let plant = Federation::new();
    let tls = trust::server_config(&plant.aggregator(), plant.edges.certificate_der()).unwrap();
    let server = bind_server("127.0.0.1:0".parse().unwrap(), tls, &limits()).unwrap();
    let waited = Duration::from_secs(3);
    let client = bind_client(&Limits {
        welcome_timeout: waited,
        ..limits()
    })
    .unwrap();
    let tls = plant.tls(&plant.edge("press-1"));
    let begin = std::time::Instant::now();
    let outcome = connect(&client, server.local_addr().unwrap(), "localhost", tls, hello()).await;
    assert!(
        matches!(outcome, Err(ConnectError::NoWelcome { waited: found, .. }) if found == waited),
        "{outcome:?}"
    );
    assert!(begin.elapsed() < PATIENCE, "{:?}", begin.elapsed());
    until(|| client.open_connections() == 0).await;
}

#[tokio::test]
async fn nobody_there_is_told_as_unreachable() {
    let plant = Federation::new();
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let client = bind_client(&Limits {
        welcome_timeout: Duration::from_millis(300),
        ..limits()
    })
    .unwrap();
    let tls = plant.tls(&plant.edge("press-1"));
    let outcome = connect(&client, silent.local_addr().unwrap(), "localhost", tls, hello()).await;
    match outcome {
        Err(error @ ConnectError::Unreachable { .. }) => {
            assert!(error.hint().unwrap().contains("UDP") && !error.needs_a_person());
        }
        other => panic!("expected unreachable, got {other:?}"),
    }
}

#[tokio::test]
async fn anything_but_a_welcome_is_no_connection() {
    let plant = Federation::new();
    let tls = trust::server_config(&plant.aggregator(), plant.edges.certificate_der()).unwrap();
    let server = bind_server("127.0.0.1:0".parse().unwrap(), tls, &limits()).unwrap();
    let client = bind_client(&limits()).unwrap();
    let addr = server.local_addr().unwrap();
    let dial = || {
        connect(
            &client,
            addr,
            "localhost",
            plant.tls(&plant.edge("press-1")),
            hello(),
        )
    };

    let goodbye = async {
        let mut session = server.accept().await.unwrap();
        session.recv().await.unwrap();
        session
            .send(&ToEdge::Goodbye(GoodbyeV1 {
                retry_after_ms: 7_000,
            }))
            .await
            .unwrap();
        session.split().0.finish(CloseCode::GoingDown, "").await;
    };
    let (outcome, ()) = tokio::join!(dial(), goodbye);
    assert_eq!(outcome.unwrap_err().retry_after(), Some(Duration::from_secs(7)));

    let closed = async {
        let mut session = server.accept().await.unwrap();
        session.recv().await.unwrap();
        let closed = theriac_protocol::message::ClosedV1 {
            round: theriac_protocol::units::Round(1),
            outcome: theriac_protocol::refusal::RoundOutcome::Aborted(
                theriac_protocol::refusal::AbortReason::QuorumMissed,
            ),
        };
        session.send(&ToEdge::Closed(closed)).await.unwrap();
        session.split().0.finish(CloseCode::Done, "").await;
    };
    let (outcome, ()) = tokio::join!(dial(), closed);
    assert!(matches!(outcome, Err(ConnectError::Protocol(_))), "{outcome:?}");

    let wordless = async {
        let mut session = server.accept().await.unwrap();
        session.recv().await.unwrap();
        session
            .split()
            .0
            .finish(CloseCode::Replaced, "another session of this site")
            .await;
    };
    let (outcome, ()) = tokio::join!(dial(), wordless);
    let replaced = Loss::Closed {
        code: Some(CloseCode::Replaced),
        reason: "another session of this site".to_owned(),
    };
    assert!(matches!(outcome, Err(ConnectError::Lost { loss, .. }) if loss == replaced));
}
