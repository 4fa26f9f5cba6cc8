//! One deployment of Kubernetes: rollout restart, one more pod, back to the revision before. With the feature `kubernetes`.
//!
//! | | `rollout_restart` | `scale_up` | `rollout_undo` |
//! |---|---|---|---|
//! | precondition | the deployment is named in the configuration, is there and not paused; the policy allows it (R2) | the same, R3; fewer than [`KubernetesHands::replicas_max`] | the same, R3; there is an older revision |
//! | effect | the pod template's annotation `kubectl.kubernetes.io/restartedAt`, as `kubectl rollout restart` does | one more replica, over the subresource `scale` | the template of the newest older replica set, as `kubectl rollout undo` does |
//! | undo | none needed: new pods come before old ones go | a person's, or an autoscaler's | another undo |
//! | verified by | the service's own probe; here that the rollout came to its end | the same | the same |
//!
//! Every write names the version of the object that it was made from, so a change by somebody else meanwhile is a conflict; the object is then
//! read again, at most [`ATTEMPTS`] times in all. A restart carries its intent as an annotation, and the same intent is not applied twice.
//! Role that it needs: `get`, `patch` on the one `deployments` object; `get`, `update` on its `deployments/scale`; `list` on `replicasets`.

mod api;

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use self::api::Sent;
pub use self::api::{ApiError, ApiServer};
use super::unit::ObjectName;
use crate::types::ActionKind;

/// The hands on one deployment.
#[derive(Debug, Clone)]
pub struct KubernetesHands {
    /// Where.
    pub api: ApiServer,
    /// Its namespace.
    pub namespace: ObjectName,
    /// Its name.
    pub deployment: ObjectName,
    /// Most pods that it is scaled to.
    pub replicas_max: u32,
    /// Longest time for everything together, the rollout included.
    pub timeout: Duration,
    /// Time between two looks at a rollout.
    pub poll: Duration,
}

/// Why a deployment was not changed, or not to the end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KubernetesError {
    /// The API server.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Somebody has paused it.
    #[error("{0} is paused")]
    Paused(ObjectName),
    /// It has as many pods as it may.
    #[error("{name} has {replicas} replicas, and may have {most}")]
    AtBound {
        /// The deployment.
        name: ObjectName,
        /// Now.
        replicas: u64,
        /// At most.
        most: u32,
    },
    /// There is no older revision.
    #[error("{0} has no older revision")]
    NoRevision(ObjectName),
    /// The rollout stands still: its progress deadline has passed.
    #[error("the rollout of {0} stands still: its progress deadline has passed")]
    Stalled(ObjectName),
    /// It took too long. The rollout may go on.
    #[error("{name}: no end within {after:?}; the rollout may go on")]
    Timeout {
        /// The deployment.
        name: ObjectName,
        /// The time.
        after: Duration,
    },
    /// Another action.
    #[error("{0} is no action on a deployment")]
    NoAction(ActionKind),
}

impl KubernetesHands {
    /// Carries an action out and waits for the rollout. `intent` is the same for the same intent alone. What was seen, in words.
    ///
    /// # Errors
    /// [`KubernetesError`].
    pub async fn act(&self, action: ActionKind, intent: &str) -> Result<String, KubernetesError> {
        let all = async {
            let told = self.change(action, intent).await?;
            self.rolled_out().await?;
            Ok(told)
        };
        timeout(self.timeout, all)
            .await
            .map_err(|_| KubernetesError::Timeout {
                name: self.deployment.clone(),
                after: self.timeout,
            })?
    }

    async fn change(&self, action: ActionKind, intent: &str) -> Result<String, KubernetesError> {
        for attempt in 1.. {
            let tried = match action {
                ActionKind::RolloutRestart => self.restart(intent).await,
                ActionKind::ScaleUp => self.scale_up().await,
                ActionKind::RolloutUndo => self.undo().await,
                other => Err(KubernetesError::NoAction(other)),
            };
            match tried {
                Err(KubernetesError::Api(ApiError::Conflict(_))) if attempt < ATTEMPTS => {}
                done => return done,
            }
        }
        Err(KubernetesError::NoAction(action))
    }

    async fn restart(&self, intent: &str) -> Result<String, KubernetesError> {
        let found = self.read().await?;
        if found["spec"]["template"]["metadata"]["annotations"][INTENT] == intent {
            return Ok(format!("{} was restarted for this already", self.deployment));
        }
        let at = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let change = json!({
            "metadata": { "resourceVersion": found["metadata"]["resourceVersion"] },
            "spec": { "template": { "metadata": { "annotations": { RESTARTED_AT: at, INTENT: intent } } } },
        });
        self.api.call(&self.path(""), Sent::Merge(change)).await?;
        Ok(format!("{} was restarted pod by pod", self.deployment))
    }

    async fn scale_up(&self) -> Result<String, KubernetesError> {
        self.read().await?;
        let mut scale = self.api.call(&self.path("/scale"), Sent::Nothing).await?;
        let replicas = scale["spec"]["replicas"].as_u64().unwrap_or(0);
        if replicas >= u64::from(self.replicas_max) {
            return Err(KubernetesError::AtBound {
                name: self.deployment.clone(),
                replicas,
                most: self.replicas_max,
            });
        }
        scale["spec"]["replicas"] = json!(replicas + 1);
        self.api.call(&self.path("/scale"), Sent::Object(scale)).await?;
        Ok(format!(
            "{} has {} replicas, before {replicas}",
            self.deployment,
            replicas + 1
        ))
    }

    async fn undo(&self) -> Result<String, KubernetesError> {
        let found = self.read().await?;
        let current = revision(&found);
        let sets = self.api.call(&self.sets(&found), Sent::Nothing).await?;
        let owned = |set: &&Value| {
            let owners = set["metadata"]["ownerReferences"].as_array();
            owners.is_some_and(|owners| owners.iter().any(|of| of["uid"] == found["metadata"]["uid"]))
        };
        let older = sets["items"].as_array().into_iter().flatten().filter(owned);
        let Some(set) = older
            .filter(|set| revision(set) < current)
            .max_by_key(|set| revision(set))
        else {
            return Err(KubernetesError::NoRevision(self.deployment.clone()));
        };
        let mut template = set["spec"]["template"].clone();
        if let Some(labels) = template["metadata"]["labels"].as_object_mut() {
            // The replica set's own mark.
            labels.remove("pod-template-hash");
        }
        let change = json!([
            { "op": "test", "path": "/metadata/resourceVersion", "value": found["metadata"]["resourceVersion"] },
            { "op": "replace", "path": "/spec/template", "value": template },
        ]);
        let done = self.api.call(&self.path(""), Sent::Patch(change)).await;
        // So the API says that the version is another one by now.
        done.map_err(|error| match error {
            ApiError::Refused { code: 422, message } => ApiError::Conflict(message),
            other => other,
        })?;
        Ok(format!(
            "{} went back from revision {current} to {}",
            self.deployment,
            revision(set)
        ))
    }

    /// The deployment, if it may be changed at all.
    async fn read(&self) -> Result<Value, KubernetesError> {
        let found = self.api.call(&self.path(""), Sent::Nothing).await?;
        if found["spec"]["paused"] == true {
            return Err(KubernetesError::Paused(self.deployment.clone()));
        }
        Ok(found)
    }

    /// Waits until every pod is of the present template and available, as `kubectl rollout status` does.
    async fn rolled_out(&self) -> Result<(), KubernetesError> {
        loop {
            let found = self.api.call(&self.path(""), Sent::Nothing).await?;
            let (wanted, status) = (&found["spec"]["replicas"], &found["status"]);
            let number = |value: &Value| value.as_u64().unwrap_or(0);
            if number(&status["observedGeneration"]) >= number(&found["metadata"]["generation"]) {
                let conditions = status["conditions"].as_array().into_iter().flatten();
                let mut stalled = conditions.filter(|of| of["reason"] == "ProgressDeadlineExceeded");
                if stalled.next().is_some() {
                    return Err(KubernetesError::Stalled(self.deployment.clone()));
                }
                let all = ["replicas", "updatedReplicas", "availableReplicas"];
                if all.iter().all(|name| number(&status[*name]) == number(wanted)) {
                    return Ok(());
                }
            }
            sleep(self.poll).await;
        }
    }

    fn path(&self, sub: &str) -> String {
        format!(
            "/apis/apps/v1/namespaces/{}/deployments/{}{sub}",
            self.namespace, self.deployment
        )
    }

    /// Where the replica sets of a deployment are listed.
    fn sets(&self, deployment: &Value) -> String {
        let labels = deployment["spec"]["selector"]["matchLabels"].as_object();
        let pairs: Vec<String> = labels
            .into_iter()
            .flatten()
            .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
            .collect();
        let selector = encoded(&pairs.join(","));
        format!(
            "/apis/apps/v1/namespaces/{}/replicasets?labelSelector={selector}",
            self.namespace
        )
    }
}

fn revision(object: &Value) -> u64 {
    let text = object["metadata"]["annotations"]["deployment.kubernetes.io/revision"].as_str();
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// RFC 3986: everything but unreserved characters.
fn encoded(text: &str) -> String {
    let mut plain = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            plain.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _written = write!(plain, "%{byte:02X}").is_ok();
        }
    }
    plain
}

/// Most times that an object is read because somebody else had changed it.
pub const ATTEMPTS: u32 = 3;
const INTENT: &str = "theriac.dev/intent";
const RESTARTED_AT: &str = "kubectl.kubernetes.io/restartedAt";
