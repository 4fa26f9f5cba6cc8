//! The door itself: proofs of address, budgets, limits, the exchange of certificates.

use std::time::Duration;

use theriac_certs::trust;
use theriac_transport::{ConnectError, Limits, Loss, SocketBuffers, bind_client, connect};

use crate::fleet::{Aggregator, Federation, PATIENCE, Raw, hello, knock, limits, until};

#[tokio::test]
async fn socket_buffers_are_read_back_on_both_ends() {
    let plant = Federation::new();
    let asked = Limits {
        socket_buffer_bytes: 128 * 1024,
        ..limits()
    };
    let aggregator = Aggregator::start(&plant, &asked);
    let expected = SocketBuffers {
        send: 128 * 1024,
        receive: 128 * 1024,
    };
    assert_eq!(aggregator.endpoint.granted(), expected);
    assert_eq!(bind_client(&asked).unwrap().granted(), expected);
    // The kernel clamps what it does not allow, and that is what is told.
    let greedy = bind_client(&Limits {
        socket_buffer_bytes: 1 << 30,
        ..limits()
    })
    .unwrap()
    .granted();
    assert!(greedy.send > 0 && greedy.send < 1 << 30, "{greedy:?}");
}

#[tokio::test]
async fn when_many_are_pending_a_newcomer_proves_its_address_and_gets_in() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(
        &plant,
        &Limits {
            handshakes_before_retry: 0,
            ..limits()
        },
    );
    knock(&aggregator, plant.tls(&plant.edge("press-1")))
        .await
        .unwrap();
    let stats = aggregator.endpoint.accept_stats();
    // On a busy machine it may have asked once more before it was answered.
    assert!(stats.retried >= 1, "{stats:?}");
    assert_eq!((stats.accepted, stats.refused), (1, 0));
}

#[tokio::test]
async fn beyond_the_hard_cap_newcomers_are_refused_as_busy() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(
        &plant,
        &Limits {
            handshakes_max: 1,
            ..limits()
        },
    );
    // Half-open: the handshake is done, the stream never opened, so the slot stays taken.
    let (certificate, key) = crate::fleet::certificate_and_key(&plant.edge("slow"));
    let tls = plant.tls_with(Some((certificate, key)), trust::ALPN);
    let _half_open = Raw::connect(aggregator.addr, tls).await;
    until(|| aggregator.endpoint.accept_stats().pending == 1).await;
    expect_busy(knock(&aggregator, plant.tls(&plant.edge("press-1"))).await);
    assert_eq!(aggregator.endpoint.accept_stats().refused, 1);
}

#[tokio::test]
async fn a_half_open_connection_is_dropped_after_its_time() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(
        &plant,
        &Limits {
            handshake_timeout: Duration::from_secs(3),
            ..limits()
        },
    );
    let raw = Raw::connect(aggregator.addr, plant.tls(&plant.edge("slow"))).await;
    until(|| aggregator.endpoint.accept_stats().timed_out == 1).await;
    raw.connection.closed().await;
    aggregator.expect_empty().await;
}

#[tokio::test]
async fn at_the_limit_of_connections_newcomers_are_refused_and_later_let_in() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(
        &plant,
        &Limits {
            connections_max: 1,
            ..limits()
        },
    );
    let (first, _) = knock(&aggregator, plant.tls(&plant.edge("press-1")))
        .await
        .unwrap();
    expect_busy(knock(&aggregator, plant.tls(&plant.edge("press-2"))).await);
    first.finish().await;
    aggregator.expect_empty().await;
    knock(&aggregator, plant.tls(&plant.edge("press-2")))
        .await
        .unwrap();
}

#[tokio::test]
async fn an_address_over_its_budget_is_asked_for_proof_and_then_refused() {
    let plant = Federation::new();
    let budget = Limits {
        address_burst: 2,
        address_per_second: 0,
        address_budget_on_loopback: true,
        ..limits()
    };
    let begun = std::time::Instant::now();
    loop {
        let aggregator = Aggregator::start(&plant, &budget);
        let mut longest = Duration::ZERO;
        let mut knocks = Vec::new();
        for _ in 0..5 {
            let asked = std::time::Instant::now();
            knocks.push(knock(&aggregator, plant.tls(&plant.edge("press-1"))).await);
            longest = longest.max(asked.elapsed());
        }
        // Who is not answered for a second asks again, and that is charged: on so busy a machine it is tried anew.
        if longest > Duration::from_millis(500) {
            println!("a knock took {longest:?}, tried anew");
            assert!(begun.elapsed() < PATIENCE, "never fast enough");
            continue;
        }
        let fifth = knocks.pop().unwrap();
        assert!(knocks.iter().all(Result::is_ok), "{knocks:?}");
        expect_busy(fifth);
        let stats = aggregator.endpoint.accept_stats();
        assert_eq!((stats.accepted, stats.retried, stats.refused), (4, 3, 1));
        return;
    }
}

#[tokio::test]
async fn a_new_server_certificate_leaves_open_sessions_alone() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let client = bind_client(&limits()).unwrap();
    let dial = |name: &str| {
        connect(
            &client,
            aggregator.addr,
            "localhost",
            plant.tls(&plant.edge(name)),
            hello(),
        )
    };
    let (mut before, _) = dial("press-1").await.unwrap();
    let renewed = plant.aggregator();
    let tls = trust::server_config(&renewed, plant.edges.certificate_der()).unwrap();
    aggregator.endpoint.set_server_tls(tls).unwrap();
    let (after, _) = dial("press-2").await.unwrap();
    assert_eq!(after.handle().peer_certificate_der(), renewed.certificate_der());
    assert_ne!(before.handle().peer_certificate_der(), renewed.certificate_der());
    before.send(&crate::fleet::update(10)).await.unwrap();
    before.recv().await.unwrap();
    assert!(
        client
            .set_server_tls(trust::join_server_config(&renewed).unwrap())
            .is_err()
    );
}

#[tokio::test]
async fn a_closed_endpoint_ends_accepting() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let (mut session, _) = knock(&aggregator, plant.tls(&plant.edge("press-1")))
        .await
        .unwrap();
    aggregator
        .endpoint
        .close(theriac_transport::CloseCode::GoingDown, "update");
    assert!(aggregator.endpoint.accept().await.is_none());
    let lost = session.recv().await.unwrap_err();
    assert_eq!(
        lost.to_string(),
        "the connection is lost: closed by the peer (GoingDown): update"
    );
    aggregator.endpoint.wait_idle().await;
}

fn expect_busy<T: std::fmt::Debug>(outcome: Result<T, ConnectError>) {
    match outcome {
        Err(error @ ConnectError::Lost { loss: Loss::Busy, .. }) => {
            assert!(error.hint().is_some() && !error.needs_a_person());
        }
        other => panic!("expected busy, got {other:?}"),
    }
}
