//! A deployment over the Kubernetes API: a faithful server on loopback, with TLS, versions of objects, conflicts and refusals.

#![cfg(feature = "kubernetes")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tempfile::TempDir;
use theriac_heal::executor::kubernetes::{ApiError, ApiServer, KubernetesError, KubernetesHands};
use theriac_heal::executor::unit::ObjectName;
use theriac_heal::types::ActionKind;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// What the server holds, and how it behaves.
#[derive(Debug)]
struct Cluster {
    deployment: Value,
    sets: Value,
    /// Method, path and content type of each call.
    calls: Vec<String>,
    /// So many writes meet an object that somebody else has just changed.
    conflicts: u32,
    forbidden: bool,
    silent: bool,
    stalled: bool,
}

type Shared = Arc<Mutex<Cluster>>;

/// As `kubectl get deployment web -o json` and `kubectl get replicasets -o json` show them, cut to what matters.
fn cluster() -> Shared {
    let set = |revision: u32, image: &str, owner: &str| {
        json!({
            "metadata": {
                "name": format!("web-{revision}"),
                "annotations": { "deployment.kubernetes.io/revision": revision.to_string() },
                "ownerReferences": [{ "kind": "Deployment", "name": "web", "uid": owner }],
            },
            "spec": { "template": {
                "metadata": { "labels": { "app": "web", "pod-template-hash": format!("h{revision}") } },
                "spec": { "containers": [{ "name": "web", "image": image }] },
            } },
        })
    };
    Arc::new(Mutex::new(Cluster {
        deployment: json!({
            "kind": "Deployment",
            "metadata": {
                "name": "web", "uid": "u1", "resourceVersion": "100", "generation": 4,
                "annotations": { "deployment.kubernetes.io/revision": "3" },
            },
            "spec": {
                "replicas": 2,
                "selector": { "matchLabels": { "app": "web" } },
                "template": {
                    "metadata": { "labels": { "app": "web" } },
                    "spec": { "containers": [{ "name": "web", "image": "web:3" }] },
                },
            },
            "status": { "observedGeneration": 4, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2 },
        }),
        sets: json!({ "kind": "ReplicaSetList", "items": [
            set(1, "web:1", "u1"), set(3, "web:3", "u1"), set(2, "web:2", "u1"), set(9, "other:9", "u2"),
        ] }),
        calls: Vec::new(),
        conflicts: 0,
        forbidden: false,
        silent: false,
        stalled: false,
    }))
}

impl Cluster {
    /// The answer to one call; `None` is silence.
    fn answer(&mut self, method: &Method, path: &str, kind: &str, body: &Value) -> Option<(u16, Value)> {
        const OBJECT: &str = "/apis/apps/v1/namespaces/shop/deployments/web";
        self.calls.push(format!("{method} {path} {kind}"));
        if self.silent {
            return None;
        }
        let status = |code: u16, message: &str| {
            Some((
                code,
                json!({ "kind": "Status", "status": "Failure", "message": message, "code": code }),
            ))
        };
        if self.forbidden {
            return status(
                403,
                "deployments.apps \"web\" is forbidden: User \"theriac\" cannot patch resource",
            );
        }
        if *method == Method::GET {
            self.roll();
            return match path {
                OBJECT => Some((200, self.deployment.clone())),
                _ if path == format!("{OBJECT}/scale") => Some((200, self.scale())),
                "/apis/apps/v1/namespaces/shop/replicasets?labelSelector=app%3Dweb" => {
                    Some((200, self.sets.clone()))
                }
                _ => status(404, "not found"),
            };
        }
        let version = self.deployment["metadata"]["resourceVersion"].clone();
        if self.conflicts > 0 {
            self.conflicts -= 1;
            self.touched();
            if kind == "application/json-patch+json" {
                return status(
                    422,
                    "the server rejected our request due to an error in our request",
                );
            }
            return status(
                409,
                "the object has been modified; please apply your changes to the latest version",
            );
        }
        match (method.as_str(), kind) {
            ("PATCH", "application/strategic-merge-patch+json") => {
                if body["metadata"]["resourceVersion"] != version {
                    return status(409, "the object has been modified");
                }
                let notes = &body["spec"]["template"]["metadata"]["annotations"];
                let own = &mut self.deployment["spec"]["template"]["metadata"]["annotations"];
                if own.is_null() {
                    *own = json!({});
                }
                for (name, value) in notes.as_object().unwrap() {
                    own[name.as_str()] = value.clone();
                }
            }
            ("PATCH", "application/json-patch+json") => {
                assert_eq!(
                    (&body[0]["op"], &body[0]["path"]),
                    (&json!("test"), &json!("/metadata/resourceVersion"))
                );
                if body[0]["value"] != version {
                    return status(
                        422,
                        "the server rejected our request due to an error in our request",
                    );
                }
                assert_eq!(
                    (&body[1]["op"], &body[1]["path"]),
                    (&json!("replace"), &json!("/spec/template"))
                );
                self.deployment["spec"]["template"] = body[1]["value"].clone();
            }
            ("PUT", "application/json") if path.ends_with("/scale") => {
                if body["metadata"]["resourceVersion"] != version {
                    return status(409, "the object has been modified");
                }
                self.deployment["spec"]["replicas"] = body["spec"]["replicas"].clone();
            }
            _ => return status(415, "unsupported media type"),
        }
        self.touched();
        let generation = self.deployment["metadata"]["generation"].as_u64().unwrap();
        self.deployment["metadata"]["generation"] = json!(generation + 1);
        Some((200, self.deployment.clone()))
    }

    fn touched(&mut self) {
        let version = &mut self.deployment["metadata"]["resourceVersion"];
        let next: u64 = version.as_str().unwrap().parse::<u64>().unwrap() + 1;
        *version = json!(next.to_string());
    }

    fn scale(&self) -> Value {
        json!({
            "kind": "Scale",
            "metadata": { "name": "web", "resourceVersion": self.deployment["metadata"]["resourceVersion"] },
            "spec": { "replicas": self.deployment["spec"]["replicas"] },
        })
    }

    /// The controller at work: with each look it comes one step nearer.
    fn roll(&mut self) {
        let generation = self.deployment["metadata"]["generation"].clone();
        let replicas = self.deployment["spec"]["replicas"].clone();
        let status = &mut self.deployment["status"];
        if status["observedGeneration"] != generation {
            status["observedGeneration"] = generation;
            status["updatedReplicas"] = json!(0);
        } else if self.stalled {
            status["conditions"] = json!([{ "type": "Progressing", "reason": "ProgressDeadlineExceeded" }]);
        } else if status["updatedReplicas"] != replicas {
            let done = status["updatedReplicas"].as_u64().unwrap() + 1;
            status["updatedReplicas"] = json!(done);
            status["replicas"] = replicas;
            status["availableReplicas"] = json!(done);
        }
    }
}

async fn served(cluster: Shared, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let header = |name| {
        let value = request.headers().get(name);
        value
            .map(|value| value.to_str().unwrap().to_owned())
            .unwrap_or_default()
    };
    let (authorised, kind) = (header(AUTHORIZATION) == "Bearer secret", header(CONTENT_TYPE));
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let path = parts.uri.path_and_query().unwrap().as_str().to_owned();
    let answer = if authorised {
        cluster.lock().unwrap().answer(&parts.method, &path, &kind, &body)
    } else {
        Some((401, json!({ "kind": "Status", "message": "Unauthorized" })))
    };
    let Some((code, value)) = answer else {
        return std::future::pending().await;
    };
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())));
    *response.status_mut() = code.try_into().unwrap();
    response
}

/// A server for this cluster, and the hands on its deployment.
async fn stage(cluster: &Shared) -> (TempDir, KubernetesHands) {
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(dir.path().join("ca.crt"), made.cert.pem()).unwrap();
    std::fs::write(dir.path().join("token"), "secret\n").unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let cluster = Arc::clone(cluster);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (acceptor, cluster) = (acceptor.clone(), Arc::clone(&cluster));
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else {
                    return;
                };
                let service = service_fn(move |request| {
                    let cluster = Arc::clone(&cluster);
                    async move { Ok::<_, Infallible>(served(cluster, request).await) }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                drop(connection.serve_connection(TokioIo::new(stream), service).await);
            });
        }
    });
    let hands = hands(dir.path(), port);
    (dir, hands)
}

fn hands(dir: &Path, port: u16) -> KubernetesHands {
    let name = |name: &str| ObjectName::try_from(name.to_owned()).unwrap();
    KubernetesHands {
        api: ApiServer {
            host: "127.0.0.1".to_owned(),
            port,
            ca_file: dir.join("ca.crt"),
            token_file: dir.join("token"),
        },
        namespace: name("shop"),
        deployment: name("web"),
        replicas_max: 3,
        timeout: Duration::from_mins(1),
        poll: Duration::from_millis(1),
    }
}

#[tokio::test]
async fn a_restart_marks_the_template_waits_for_every_pod_and_is_applied_once_for_an_intent() {
    let cluster = cluster();
    let (_dir, hands) = stage(&cluster).await;
    let told = hands.act(ActionKind::RolloutRestart, "a-kv-7-1").await.unwrap();
    assert!(told.contains("pod by pod"), "{told}");
    {
        let seen = cluster.lock().unwrap();
        let notes = &seen.deployment["spec"]["template"]["metadata"]["annotations"];
        assert_eq!(notes["theriac.dev/intent"], "a-kv-7-1");
        assert!(
            notes["kubectl.kubernetes.io/restartedAt"]
                .as_str()
                .unwrap()
                .ends_with('Z')
        );
        assert_eq!(seen.deployment["status"]["availableReplicas"], 2);
        assert_eq!(
            seen.deployment["spec"]["template"]["spec"]["containers"][0]["image"],
            "web:3"
        );
    }
    let again = hands.act(ActionKind::RolloutRestart, "a-kv-7-1").await.unwrap();
    assert!(again.contains("already"), "{again}");
    let writes = cluster
        .lock()
        .unwrap()
        .calls
        .iter()
        .filter(|call| !call.starts_with("GET"))
        .count();
    assert_eq!(writes, 1);
}

#[tokio::test]
async fn one_more_pod_up_to_the_bound() {
    let cluster = cluster();
    let (_dir, hands) = stage(&cluster).await;
    let told = hands.act(ActionKind::ScaleUp, "i").await.unwrap();
    assert!(told.contains("3 replicas, before 2"), "{told}");
    assert_eq!(
        cluster.lock().unwrap().deployment["status"]["availableReplicas"],
        3
    );
    let refused = hands.act(ActionKind::ScaleUp, "i").await;
    assert!(matches!(
        refused,
        Err(KubernetesError::AtBound { replicas: 3, .. })
    ));
    assert_eq!(cluster.lock().unwrap().deployment["spec"]["replicas"], 3);
}

#[tokio::test]
async fn an_undo_takes_the_newest_older_template_of_its_own() {
    let cluster = cluster();
    let (_dir, hands) = stage(&cluster).await;
    let told = hands.act(ActionKind::RolloutUndo, "i").await.unwrap();
    assert!(told.contains("from revision 3 to 2"), "{told}");
    let template = cluster.lock().unwrap().deployment["spec"]["template"].clone();
    assert_eq!(template["spec"]["containers"][0]["image"], "web:2");
    assert_eq!(template["metadata"]["labels"], json!({ "app": "web" }));
    cluster.lock().unwrap().sets["items"] = json!([]);
    let none = hands.act(ActionKind::RolloutUndo, "i").await;
    assert!(matches!(none, Err(KubernetesError::NoRevision(_))));
}

#[tokio::test]
async fn a_conflict_is_read_again_a_few_times_and_then_told() {
    let cluster = cluster();
    let (_dir, hands) = stage(&cluster).await;
    cluster.lock().unwrap().conflicts = 2;
    hands.act(ActionKind::ScaleUp, "i").await.unwrap();
    assert_eq!(
        cluster.lock().unwrap().deployment["spec"]["replicas"],
        3,
        "added once"
    );
    cluster.lock().unwrap().conflicts = 1;
    hands.act(ActionKind::RolloutUndo, "i").await.unwrap();
    cluster.lock().unwrap().conflicts = 3;
    let told = hands.act(ActionKind::RolloutRestart, "i").await.unwrap_err();
    assert!(
        matches!(told, KubernetesError::Api(ApiError::Conflict(_))),
        "{told}"
    );
    assert_eq!(cluster.lock().unwrap().conflicts, 0);
}

#[tokio::test]
async fn every_other_failure_is_told_and_is_no_success() {
    let cluster = cluster();
    let (dir, mut hands) = stage(&cluster).await;
    let restart = ActionKind::RolloutRestart;
    let set = |change: fn(&mut Cluster)| change(&mut cluster.lock().unwrap());
    set(|of| of.forbidden = true);
    let told = hands.act(restart, "i").await.unwrap_err().to_string();
    assert!(told.contains("cannot patch"), "{told}");
    set(|of| of.forbidden = false);
    set(|of| of.deployment["spec"]["paused"] = json!(true));
    assert!(matches!(
        hands.act(restart, "i").await,
        Err(KubernetesError::Paused(_))
    ));
    set(|of| of.deployment["spec"]["paused"] = json!(false));
    let writes = cluster
        .lock()
        .unwrap()
        .calls
        .iter()
        .any(|call| !call.starts_with("GET"));
    assert!(!writes, "something was changed");
    set(|of| of.stalled = true);
    assert!(matches!(
        hands.act(restart, "i").await,
        Err(KubernetesError::Stalled(_))
    ));
    let other = hands.act(ActionKind::Freeze, "i").await;
    assert!(matches!(other, Err(KubernetesError::NoAction(_))));
    std::fs::write(dir.path().join("token"), "stale").unwrap();
    let told = hands.act(restart, "i").await;
    assert!(matches!(told, Err(KubernetesError::Api(ApiError::Forbidden(_)))));
    std::fs::write(dir.path().join("token"), "secret").unwrap();
    hands.timeout = Duration::from_millis(200);
    set(|of| of.silent = true);
    assert!(matches!(
        hands.act(restart, "i").await,
        Err(KubernetesError::Timeout { .. })
    ));
    // Another authority vouches for somebody else.
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(dir.path().join("ca.crt"), made.cert.pem()).unwrap();
    hands.timeout = Duration::from_mins(1);
    let told = hands.act(restart, "i").await;
    assert!(
        matches!(told, Err(KubernetesError::Api(ApiError::Unreachable { .. }))),
        "{told:?}"
    );
}
