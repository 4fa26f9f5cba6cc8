//! Enrolment: the edge's half and the listener, over a registry of tokens as small as can be.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use theriac_certs::{
    JoinToken, LEAF_LIFETIME, PendingIdentity, csr_public_key_fingerprint, secret_matches, trust,
};
use theriac_protocol::frame::{FrameHeader, kind};
use theriac_protocol::message::{JoinRefusal, JoinReplyV1, JoinRequestV1};
use theriac_protocol::units::NodeId;
use theriac_transport::join::{Enrolled, JoinError, JoinListener, request};
use theriac_transport::{CloseCode, ConnectError, Limits, Loss, TlsSide, bind_client};

use crate::fleet::{Aggregator, Federation, Raw, knock, limits, node};

struct Record {
    node: NodeId,
    hash: [u8; 32],
    expires: SystemTime,
    used: Option<([u8; 32], Vec<u8>)>,
}

/// What the aggregator's store will do in one transaction.
struct Registry {
    plant: Arc<Federation>,
    tokens: Mutex<BTreeMap<[u8; 8], Record>>,
    asked: AtomicUsize,
    /// Answers with this authority instead of the right one.
    authority: Option<Vec<u8>>,
}

impl Registry {
    fn new(plant: &Arc<Federation>) -> Self {
        Self {
            plant: Arc::clone(plant),
            tokens: Mutex::default(),
            asked: AtomicUsize::new(0),
            authority: None,
        }
    }

    fn token(&self, site: &str, expires: SystemTime) -> JoinToken {
        let token = JoinToken::generate(self.plant.aggregators.fingerprint()).unwrap();
        let record = Record {
            node: node(site),
            hash: token.secret_hash(),
            expires,
            used: None,
        };
        self.tokens.lock().unwrap().insert(token.id, record);
        token
    }

    fn answer(&self, asked: &JoinRequestV1) -> JoinReplyV1 {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.judge(asked).unwrap_or_else(JoinReplyV1::Refused)
    }

    fn judge(&self, asked: &JoinRequestV1) -> Result<JoinReplyV1, JoinRefusal> {
        let mut tokens = self.tokens.lock().unwrap();
        let record = tokens.get_mut(&asked.token_id).ok_or(JoinRefusal::UnknownToken)?;
        if !secret_matches(&asked.token_id, &asked.secret, &record.hash) {
            return Err(JoinRefusal::UnknownToken);
        }
        if SystemTime::now() > record.expires {
            return Err(JoinRefusal::Expired);
        }
        let key = csr_public_key_fingerprint(&asked.csr).map_err(|_| JoinRefusal::BadRequest)?;
        let certificate = match &record.used {
            Some((used_by, certificate)) if *used_by == key => certificate.clone(),
            Some(_) => return Err(JoinRefusal::Spent),
            None => {
                let begin = SystemTime::now() - theriac_certs::CLOCK_SKEW;
                let signed = self
                    .plant
                    .edges
                    .sign_csr(&asked.csr, &record.node, begin, LEAF_LIFETIME);
                signed.map_err(|_| JoinRefusal::BadRequest)?
            }
        };
        record.used = Some((key, certificate.clone()));
        let right = || self.plant.aggregators.certificate_der().to_vec();
        Ok(JoinReplyV1::Enrolled {
            node: record.node.clone(),
            federation: "plant".to_owned(),
            aggregator: "localhost:7070".to_owned(),
            certificate,
            edge_authority: self.plant.edges.certificate_der().to_vec(),
            aggregator_authority: self.authority.clone().unwrap_or_else(right),
        })
    }
}

fn listen(registry: &Arc<Registry>, limits: &Limits) -> SocketAddr {
    let tls = trust::join_server_config(&registry.plant.aggregator()).unwrap();
    let listener = JoinListener::bind("127.0.0.1:0".parse().unwrap(), tls, limits).unwrap();
    let (addr, registry) = (listener.local_addr().unwrap(), Arc::clone(registry));
    tokio::spawn(listener.serve(move |asked, _| {
        let registry = Arc::clone(&registry);
        async move { registry.answer(&asked) }
    }));
    addr
}

fn soon() -> SystemTime {
    SystemTime::now() + Duration::from_hours(1)
}

async fn join(addr: SocketAddr, token: &JoinToken, pending: &PendingIdentity) -> Result<Enrolled, JoinError> {
    request(
        &bind_client(&limits()).unwrap(),
        addr,
        "localhost",
        token,
        pending.csr_der().unwrap(),
    )
    .await
}

#[tokio::test]
async fn a_new_edge_enrols_with_its_own_key_and_is_then_welcomed() {
    let plant = Arc::new(Federation::new());
    let registry = Arc::new(Registry::new(&plant));
    let addr = listen(&registry, &limits());
    let (token, pending) = (
        registry.token("press-7", soon()),
        PendingIdentity::generate().unwrap(),
    );
    let enrolled = join(addr, &token, &pending).await.unwrap();
    assert_eq!(
        (&enrolled.node, enrolled.aggregator.as_str()),
        (&node("press-7"), "localhost:7070")
    );
    assert_eq!(enrolled.aggregator_authority, plant.aggregators.certificate_der());

    let identity = pending
        .complete(&enrolled.certificate, &enrolled.edge_authority)
        .unwrap();
    let aggregator = Aggregator::start(&plant, &limits());
    let tls = trust::client_config(&identity, &enrolled.aggregator_authority).unwrap();
    let (_session, welcome) = knock(&aggregator, tls).await.unwrap();
    assert_eq!(welcome.node, node("press-7"));
}

#[tokio::test]
async fn the_same_token_with_the_same_key_gives_the_same_certificate() {
    let registry = Arc::new(Registry::new(&Arc::new(Federation::new())));
    let addr = listen(&registry, &limits());
    let (token, dir) = (registry.token("press-7", soon()), tempfile::tempdir().unwrap());
    let mut certificates = Vec::new();
    // As after a lost answer: another process, the key from disk.
    for _ in 0..3 {
        let pending = PendingIdentity::load_or_generate(dir.path(), "identity").unwrap();
        certificates.push(join(addr, &token, &pending).await.unwrap().certificate);
    }
    certificates.dedup();
    assert_eq!(certificates.len(), 1);
}

#[tokio::test]
async fn a_token_used_with_another_key_is_refused() {
    let registry = Arc::new(Registry::new(&Arc::new(Federation::new())));
    let addr = listen(&registry, &limits());
    let token = registry.token("press-7", soon());
    join(addr, &token, &PendingIdentity::generate().unwrap())
        .await
        .unwrap();
    let error = join(addr, &token, &PendingIdentity::generate().unwrap())
        .await
        .unwrap_err();
    assert!(matches!(error, JoinError::Refused(JoinRefusal::Spent)), "{error}");
    assert!(error.to_string().contains("ask for a new one"));
}

#[tokio::test]
async fn an_expired_an_unknown_and_a_guessed_token_are_refused() {
    let registry = Arc::new(Registry::new(&Arc::new(Federation::new())));
    let addr = listen(&registry, &limits());
    let expired = registry.token("press-7", SystemTime::now() - Duration::from_secs(1));
    let unknown = JoinToken::generate(expired.aggregator_authority_fingerprint).unwrap();
    let mut guessed = registry.token("press-8", soon());
    guessed.secret[15] ^= 1;
    for (token, expected) in [
        (expired, JoinRefusal::Expired),
        (unknown, JoinRefusal::UnknownToken),
        (guessed, JoinRefusal::UnknownToken),
    ] {
        let error = join(addr, &token, &PendingIdentity::generate().unwrap())
            .await
            .unwrap_err();
        assert!(
            matches!(error, JoinError::Refused(refusal) if refusal == expected),
            "{error}"
        );
        assert!(
            error.to_string().contains("theriac-aggregator token create"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn the_secret_is_never_sent_to_a_server_of_another_authority() {
    let registry = Arc::new(Registry::new(&Arc::new(Federation::new())));
    let addr = listen(&registry, &limits());
    let elsewhere = JoinToken::generate(Federation::new().aggregators.fingerprint()).unwrap();
    match join(addr, &elsewhere, &PendingIdentity::generate().unwrap()).await {
        Err(JoinError::Connect(ConnectError::Lost {
            loss: Loss::Tls { side, alert, reason },
            ..
        })) => {
            assert_eq!((side, alert), (TlsSide::Us, 46));
            assert!(reason.contains("another federation"), "{reason}");
        }
        other => panic!("expected a refused server, got {other:?}"),
    }
    assert_eq!(registry.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_answer_with_another_authority_than_the_tokens_is_not_used() {
    let plant = Arc::new(Federation::new());
    let foreign = Federation::new().aggregators.certificate_der().to_vec();
    let registry = Arc::new(Registry {
        authority: Some(foreign),
        ..Registry::new(&plant)
    });
    let addr = listen(&registry, &limits());
    let token = registry.token("press-7", soon());
    let error = join(addr, &token, &PendingIdentity::generate().unwrap())
        .await
        .unwrap_err();
    assert!(matches!(error, JoinError::WrongAuthority), "{error}");
}

#[tokio::test]
async fn the_main_port_and_the_join_port_are_not_mixed_up() {
    let plant = Arc::new(Federation::new());
    let registry = Arc::new(Registry::new(&plant));
    let addr = listen(&registry, &limits());
    let aggregator = Aggregator::start(&plant, &limits());
    let token = registry.token("press-7", soon());
    let joined = join(aggregator.addr, &token, &PendingIdentity::generate().unwrap())
        .await
        .unwrap_err();
    match joined {
        JoinError::Connect(ConnectError::Lost {
            loss:
                Loss::Tls {
                    side: TlsSide::Peer,
                    alert: 120,
                    ..
                },
            ..
        }) => {}
        other => panic!("expected alert 120, got {other:?}"),
    }
    let client = bind_client(&limits()).unwrap();
    let tls = plant.tls(&plant.edge("press-1"));
    let knocked = theriac_transport::connect(&client, addr, "localhost", tls, crate::fleet::hello()).await;
    match knocked {
        Err(
            error @ ConnectError::Lost {
                loss: Loss::Tls { alert: 120, .. },
                ..
            },
        ) => {
            assert!(error.hint().unwrap().contains("join listener"));
        }
        other => panic!("expected alert 120, got {other:?}"),
    }
}

#[tokio::test]
async fn junk_too_much_and_silence_are_turned_away_without_asking_the_registry() {
    let plant = Arc::new(Federation::new());
    let registry = Arc::new(Registry::new(&plant));
    let patience = Duration::from_secs(3);
    let addr = listen(
        &registry,
        &Limits {
            join_timeout: patience,
            ..limits()
        },
    );
    let tls = || trust::join_client_config(plant.aggregators.fingerprint()).unwrap();

    let mut junk = Raw::connect(addr, tls()).await;
    junk.announce(kind::JOIN_REQUEST_V1, 9).await;
    junk.send.write_all(b"no bincode").await.unwrap();
    let mut answer = Vec::new();
    while let Ok(Some(chunk)) = junk.receive.read_chunk(1024, true).await {
        answer.extend_from_slice(&chunk.bytes);
    }
    let (head, body) = answer.split_first_chunk().unwrap();
    assert_eq!(FrameHeader::parse(head, 1024).unwrap().kind, kind::JOIN_REPLY_V1);
    let reply =
        theriac_protocol::codec::decode_join_reply(kind::JOIN_REPLY_V1, body.to_vec().into()).unwrap();
    assert_eq!(reply, JoinReplyV1::Refused(JoinRefusal::BadRequest));

    let mut large = Raw::connect(addr, tls()).await;
    large.announce(kind::JOIN_REQUEST_V1, 16 * 1024 + 1).await;
    assert_eq!(large.closed_with().await, CloseCode::TooLarge as u64);

    let mut silent = Raw::connect(addr, tls()).await;
    silent.send.write_all(b"T").await.unwrap();
    assert_eq!(silent.closed_with().await, CloseCode::TooSlow as u64);

    assert!(
        large.connection.open_uni().await.is_err(),
        "a second stream on the join listener"
    );
    assert_eq!(registry.asked.load(Ordering::SeqCst), 0);
}
