//! What goes over an open session, and what a peer may not do with it.

use std::time::Duration;

use theriac_certs::trust;
use theriac_protocol::frame::{FrameError, kind};
use theriac_protocol::message::{FetchModelV1, GoodbyeV1, ToAggregator, ToEdge};
use theriac_protocol::refusal::RefusalCode;
use theriac_protocol::units::{Digest, ModelVersion};
use theriac_transport::{
    CloseCode, EdgeSession, Endpoint, Limits, SessionError, bind_client, bind_server, connect,
};

use crate::fleet::{
    Aggregator, FRAME_BYTES_MAX, Federation, Raw, Seen, hasty, hello, knock, limits, model, update,
};

/// Asserts that the session still does its work.
async fn expect_alive(raw: &mut Raw) {
    raw.say(&update(100)).await;
    assert!(matches!(raw.hear().await, ToEdge::Receipt(_)));
}

fn expect_refusal(message: ToEdge, code: RefusalCode) {
    match message {
        ToEdge::Refusal(refusal) => assert_eq!(refusal.code, code),
        other => panic!("expected {code}, got {other:?}"),
    }
}

async fn update_and_receipt(session: &mut EdgeSession, bytes: usize) {
    let message = update(bytes);
    session.send(&message).await.unwrap();
    let ToAggregator::Update(_, payload) = message else {
        unreachable!()
    };
    match session.recv().await.unwrap() {
        ToEdge::Receipt(receipt) => assert_eq!(receipt.payload_digest, Digest::of(&payload)),
        other => panic!("expected a receipt, got {other:?}"),
    }
}

fn bind(plant: &Federation, limits: &Limits) -> Endpoint {
    let tls = trust::server_config(&plant.aggregator(), plant.edges.certificate_der()).unwrap();
    bind_server("127.0.0.1:0".parse().unwrap(), tls, limits).unwrap()
}

#[tokio::test]
async fn updates_and_models_go_through_whole_and_are_counted() {
    let plant = Federation::new();
    let mut aggregator = Aggregator::start(&plant, &limits());
    let client = bind_client(&limits()).unwrap();
    let tls = plant.tls(&plant.edge("press-1"));
    let (mut session, _) = connect(&client, aggregator.addr, "localhost", tls, hello())
        .await
        .unwrap();
    for bytes in [0, 1, 65_536, 3_000_000] {
        update_and_receipt(&mut session, bytes).await;
        assert_eq!(
            aggregator.next_seen().await,
            Seen::Message(Box::new(update(bytes)))
        );
    }
    session
        .send(&ToAggregator::FetchModel(FetchModelV1 {
            version: ModelVersion(1),
        }))
        .await
        .unwrap();
    match session.recv().await.unwrap() {
        ToEdge::Model(header, payload) => {
            assert_eq!(
                (payload.len(), Digest::of(&payload)),
                (12_000_000, header.payload_digest)
            );
        }
        other => panic!("expected a model, got {other:?}"),
    }
    let (up, down) = (session.handle().traffic(), aggregator.endpoint.traffic());
    assert_eq!((up.frames_sent, up.frames_received), (6, 6));
    assert_eq!(
        (up.bytes_sent, up.bytes_received),
        (down.bytes_received, down.bytes_sent)
    );
    assert_eq!(up, client.traffic());
    let (sent, received) = (3_065_537..3_068_000, 12_000_000..12_003_000);
    assert!(
        sent.contains(&up.bytes_sent) && received.contains(&up.bytes_received),
        "{up:?}"
    );
}

#[tokio::test]
async fn our_own_message_over_the_limit_is_not_sent_and_the_session_lives() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let (mut session, _) = knock(&aggregator, plant.tls(&plant.edge("press-1")))
        .await
        .unwrap();
    let error = session
        .send(&update(FRAME_BYTES_MAX as usize + 1))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            SessionError::TooLarge {
                length_max: FRAME_BYTES_MAX,
                ..
            }
        ) && !error.is_fatal()
    );
    update_and_receipt(&mut session, 10).await;
}

#[tokio::test]
async fn an_unknown_kind_is_answered_and_the_session_lives() {
    let plant = Federation::new();
    let mut aggregator = Aggregator::start(&plant, &limits());
    let mut raw = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    for length in [0, 1, 100_000] {
        raw.announce(0x7f01, length).await;
        raw.send.write_all(&vec![0; length as usize]).await.unwrap();
        expect_refusal(raw.hear().await, RefusalCode::UnsupportedKind);
        assert!(!aggregator.next_error().await.is_fatal());
        expect_alive(&mut raw).await;
    }
}

#[tokio::test]
async fn a_body_that_does_not_decode_is_answered_and_the_session_lives() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let mut raw = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    for kind in [
        kind::HELLO_V1,
        kind::UPDATE_V1,
        kind::DECLINE_V1,
        kind::VERDICT_V1,
        kind::EDGE_GOODBYE_V1,
    ] {
        raw.announce(kind, 40).await;
        raw.send.write_all(&[0xff; 40]).await.unwrap();
        match raw.hear().await {
            ToEdge::Refusal(refusal) => {
                assert!(
                    matches!(refusal.code, RefusalCode::Malformed | RefusalCode::TooLarge),
                    "{kind:#x}"
                );
            }
            other => panic!("kind {kind:#x} gave {other:?}"),
        }
        expect_alive(&mut raw).await;
    }
}

#[tokio::test]
async fn a_length_of_four_gigabytes_is_refused_without_reading_on() {
    let plant = Federation::new();
    let mut aggregator = Aggregator::start(&plant, &limits());
    let mut raw = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    raw.announce(kind::UPDATE_V1, u32::MAX).await;
    expect_refusal(raw.hear().await, RefusalCode::TooLarge);
    let length_max = FRAME_BYTES_MAX;
    let expected = FrameError::TooLong {
        kind: kind::UPDATE_V1,
        length: u32::MAX,
        length_max,
    };
    assert_eq!(aggregator.next_error().await, SessionError::Frame(expected));
    assert_eq!(raw.closed_with().await, CloseCode::Refused as u64);
    aggregator.expect_empty().await;
}

#[tokio::test]
async fn before_admission_only_small_frames_are_taken() {
    let plant = Federation::new();
    let mut aggregator = Aggregator::start(&plant, &limits());
    let mut raw = Raw::connect(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    let length_max = limits().hello_bytes_max;
    raw.announce(kind::HELLO_V1, length_max + 1).await;
    expect_refusal(raw.hear().await, RefusalCode::TooLarge);
    let expected = FrameError::TooLong {
        kind: kind::HELLO_V1,
        length: length_max + 1,
        length_max,
    };
    assert_eq!(aggregator.next_error().await, SessionError::Frame(expected));
    assert_eq!(aggregator.welcomed(), 0);
    aggregator.expect_empty().await;
}

#[tokio::test]
async fn bytes_of_another_protocol_are_refused() {
    let plant = Federation::new();
    let aggregator = Aggregator::start(&plant, &limits());
    let mut raw = Raw::connect(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    raw.send.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    expect_refusal(raw.hear().await, RefusalCode::Malformed);
    assert_eq!(raw.closed_with().await, CloseCode::Refused as u64);
    assert_eq!(aggregator.welcomed(), 0);
}

#[tokio::test]
async fn a_peer_that_stops_half_way_is_dropped_after_its_time() {
    let plant = Federation::new();
    let mut aggregator = Aggregator::start(&plant, &hasty());
    // In the middle of a header, right after it, and in the middle of a body.
    for (sent, of) in [(5, 12), (12, 900_000), (40_000, 900_000)] {
        let mut raw = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
        let mut bytes = theriac_protocol::frame::FrameHeader {
            kind: kind::UPDATE_V1,
            length: 900_000,
        }
        .encode()
        .to_vec();
        bytes.resize(40_012, 0);
        let on_wire = if sent == 40_000 { 40_012 } else { sent };
        raw.send.write_all(&bytes[..on_wire]).await.unwrap();
        let done = if sent == 12 { 0 } else { sent };
        assert_eq!(aggregator.next_error().await, SessionError::TooSlow { done, of });
        assert_eq!(raw.closed_with().await, CloseCode::TooSlow as u64);
    }
    aggregator.expect_empty().await;
}

#[tokio::test]
async fn a_peer_that_leaves_half_way_is_told_apart_from_one_that_ends() {
    let plant = Federation::new();
    let mut aggregator = Aggregator::start(&plant, &limits());
    let mut raw = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    raw.announce(kind::UPDATE_V1, 100).await;
    raw.send.write_all(&[0; 30]).await.unwrap();
    raw.send.finish().unwrap();
    assert_eq!(
        aggregator.next_error().await,
        SessionError::Truncated {
            received: 30,
            expected: 100
        }
    );
    let mut raw = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    raw.send.finish().unwrap();
    assert_eq!(aggregator.next_error().await, SessionError::Ended);
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_dropped_before_admission_only() {
    let plant = Federation::new();
    let mut aggregator = Aggregator::start(&plant, &hasty());
    let mut quiet = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    let mut raw = Raw::connect(aggregator.addr, plant.tls(&plant.edge("press-2"))).await;
    // A stream is open only once something is on it.
    raw.send.write_all(b"T").await.unwrap();
    let error = aggregator.next_error().await;
    assert_eq!(error, SessionError::TooSlow { done: 1, of: 12 });
    assert_eq!(raw.closed_with().await, CloseCode::TooSlow as u64);
    expect_alive(&mut quiet).await;
}

#[tokio::test]
async fn a_peer_that_never_reads_is_dropped() {
    let plant = Federation::new();
    let mut aggregator = Aggregator::start(&plant, &hasty());
    let mut raw = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("press-1"))).await;
    raw.say(&ToAggregator::FetchModel(FetchModelV1 {
        version: ModelVersion(1),
    }))
    .await;
    assert!(matches!(
        aggregator.next_error().await,
        SessionError::TooSlow { done: 1.., .. }
    ));
    assert_eq!(raw.closed_with().await, CloseCode::TooSlow as u64);
}

#[tokio::test]
async fn receiving_survives_being_cancelled_in_the_middle_of_a_frame() {
    let plant = Federation::new();
    let server = bind(&plant, &limits());
    let mut raw = Raw::connect(server.local_addr().unwrap(), plant.tls(&plant.edge("press-1"))).await;
    let frame = theriac_protocol::codec::encode_to_aggregator(&ToAggregator::Hello(hello())).unwrap();
    let dribble = tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_millis(2));
        // Each on its own, however late.
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for byte in frame.head.chunks(3) {
            tick.tick().await;
            raw.send.write_all(byte).await.unwrap();
        }
        raw
    });
    let mut session = server.accept().await.unwrap();
    let mut cancelled = 0;
    let message = loop {
        match tokio::time::timeout(Duration::from_millis(1), session.recv()).await {
            Ok(message) => break message.unwrap(),
            Err(_) => cancelled += 1,
        }
    };
    assert_eq!(message, ToAggregator::Hello(hello()));
    assert!(cancelled > 10, "cancelled {cancelled} times");
    drop(dribble.await.unwrap());
}

#[tokio::test]
async fn sending_survives_being_cancelled_in_the_middle_of_a_frame() {
    let plant = Federation::new();
    let server = bind(&plant, &limits());
    let addr = server.local_addr().unwrap();
    let mut raw = Raw::connect(addr, plant.tls(&plant.edge("press-1"))).await;
    raw.say(&ToAggregator::Hello(hello())).await;
    let mut session = server.accept().await.unwrap();
    session.recv().await.unwrap();
    let (large, small) = (
        model(12_000_000),
        ToEdge::Goodbye(GoodbyeV1 { retry_after_ms: 1 }),
    );
    // The peer's window is far smaller than the model, and it does not read yet.
    let cancelled = tokio::time::timeout(Duration::from_millis(50), session.send(&large)).await;
    assert!(cancelled.is_err(), "{cancelled:?}");
    let sending = async {
        session.send(&small).await.unwrap();
        session.split().0.finish(CloseCode::Done, "").await;
    };
    let receiving = async {
        assert_eq!(raw.hear().await, large);
        assert_eq!(raw.hear().await, small);
    };
    tokio::join!(sending, receiving);
}

#[tokio::test]
async fn before_admission_there_is_little_time() {
    let plant = Federation::new();
    let waited = Duration::from_secs(3);
    let patient = Limits {
        hello_timeout: waited,
        frame_timeout: Duration::from_mins(1),
        ..limits()
    };
    let server = bind(&plant, &patient);
    let addr = server.local_addr().unwrap();

    let mut slow = Raw::connect(addr, plant.tls(&plant.edge("press-1"))).await;
    slow.announce(kind::HELLO_V1, 300).await;
    let mut session = server.accept().await.unwrap();
    assert_eq!(
        session.recv().await.unwrap_err(),
        SessionError::TooSlow { done: 0, of: 300 }
    );

    let mut silent = Raw::connect(addr, plant.tls(&plant.edge("press-2"))).await;
    silent.announce(0x7f01, 0).await;
    let mut session = server.accept().await.unwrap();
    assert!(!session.recv().await.unwrap_err().is_fatal());
    assert_eq!(session.recv().await.unwrap_err(), SessionError::Silent { waited });
}

#[tokio::test]
async fn uploads_beyond_the_shared_memory_are_told_busy_and_find_room_later() {
    let plant = Federation::new();
    let tight = Limits {
        upload_bytes_in_flight_max: 1 << 20,
        ..hasty()
    };
    let mut aggregator = Aggregator::start(&plant, &tight);
    // One that announces much and stops holds the room until its time is over …
    let mut hog = Raw::admitted(aggregator.addr, plant.tls(&plant.edge("hog"))).await;
    hog.announce(kind::UPDATE_V1, 900_000).await;
    hog.send.write_all(&[0; 1000]).await.unwrap();
    crate::fleet::until(|| aggregator.endpoint.traffic().bytes_received > 1000).await;
    let (mut session, _) = knock(&aggregator, plant.tls(&plant.edge("press-1")))
        .await
        .unwrap();
    session.send(&update(500_000)).await.unwrap();
    match session.recv().await.unwrap() {
        ToEdge::Refusal(refusal) => {
            assert_eq!(refusal.code, RefusalCode::Busy);
            assert!(refusal.retry_after_ms > 0);
        }
        other => panic!("expected busy, got {other:?}"),
    }
    // … small messages pass all the while …
    update_and_receipt(&mut session, 1000).await;
    assert_eq!(hog.closed_with().await, CloseCode::TooSlow as u64);
    // … and the room comes back with the hog's end and with each update that is done with.
    while aggregator.seen.try_recv().is_ok() {}
    for _ in 0..5 {
        update_and_receipt(&mut session, 1_000_000).await;
        assert!(matches!(aggregator.next_seen().await, Seen::Message(_)));
    }
}

#[tokio::test]
async fn an_update_keeps_its_share_of_memory_until_it_is_dropped() {
    let plant = Federation::new();
    let tight = Limits {
        upload_bytes_in_flight_max: 1 << 20,
        ..limits()
    };
    let mut aggregator = Aggregator::start(&plant, &tight);
    let (mut session, _) = knock(&aggregator, plant.tls(&plant.edge("press-1")))
        .await
        .unwrap();
    update_and_receipt(&mut session, 800_000).await;
    let held = aggregator.next_seen().await;
    session.send(&update(800_000)).await.unwrap();
    assert!(
        matches!(session.recv().await.unwrap(), ToEdge::Refusal(refusal) if refusal.code == RefusalCode::Busy)
    );
    drop(held);
    update_and_receipt(&mut session, 800_000).await;
}
