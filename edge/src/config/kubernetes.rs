//! `[service.kubernetes]`: a deployment beside a service. Needs a build with the feature `kubernetes`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;
use theriac_heal::executor::unit::ObjectName;
use theriac_heal::types::{ActionKind, FaultClass};

use super::host_and_port;
use super::targets::digest;

/// `[service.kubernetes]`. At least one of the three lists names a class.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct KubernetesSettings {
    /// Its namespace.
    pub namespace: ObjectName,
    /// Its name. The only one that is ever touched for this service.
    pub deployment: ObjectName,
    /// Classes for which its pods are replaced one after the other. Default none.
    #[serde(default)]
    pub restart_on: BTreeSet<FaultClass>,
    /// Classes for which it gets one more pod, up to `replicas_max`. Default none.
    #[serde(default)]
    pub scale_up_on: BTreeSet<FaultClass>,
    /// Classes for which it goes back to the revision before. Default none.
    #[serde(default)]
    pub undo_on: BTreeSet<FaultClass>,
    /// Most pods, 1 to 10 000. Needed with `scale_up_on`.
    #[serde(default)]
    pub replicas_max: u32,
    /// `HOST:PORT` of the API server. Default: what the cluster tells a pod in `KUBERNETES_SERVICE_HOST` and `_PORT`.
    pub server: Option<String>,
    /// The cluster's authority, PEM. Default: a pod's own.
    #[serde(default = "ca_file")]
    pub ca_file: PathBuf,
    /// The service account's token. Default: a pod's own.
    #[serde(default = "token_file")]
    pub token_file: PathBuf,
    /// Longest time for one rollout. Default `90s`, 1 s to 30 min, below `healing.action_timeout`.
    #[serde(default = "timeout", with = "settings::duration")]
    pub timeout: Duration,
}

impl KubernetesSettings {
    pub(super) fn wrong(&self, action_timeout: Duration) -> Option<(&'static str, String)> {
        if !cfg!(feature = "kubernetes") {
            let words = "this build has no Kubernetes: build theriac-edge with --features kubernetes";
            return Some(("kubernetes", words.to_owned()));
        }
        let classes: BTreeSet<&FaultClass> = [&self.restart_on, &self.scale_up_on, &self.undo_on]
            .into_iter()
            .flatten()
            .collect();
        if classes.is_empty() || classes.contains(&FaultClass::DependencyDown) {
            let words = "name a class in restart_on, scale_up_on or undo_on, and never dependency_down";
            return Some(("kubernetes", words.to_owned()));
        }
        if !self.scale_up_on.is_empty() && !(1..=10_000).contains(&self.replicas_max) {
            return Some(("kubernetes.replicas_max", "is outside 1 to 10000".to_owned()));
        }
        if let Some(server) = self
            .server
            .as_ref()
            .filter(|server| host_and_port(server).is_none())
        {
            let words = format!("`{server}` is not HOST:PORT");
            return Some(("kubernetes.server", words));
        }
        let range = Duration::from_secs(1)..=Duration::from_mins(30);
        (!range.contains(&self.timeout) || self.timeout >= action_timeout).then(|| {
            let words = "is outside 1s to 30m, or not below healing.action_timeout";
            ("kubernetes.timeout", words.to_owned())
        })
    }

    /// The actions with the classes for which each is configured, the gentlest first.
    pub(super) fn configured(&self) -> Vec<(ActionKind, BTreeSet<FaultClass>)> {
        vec![
            (ActionKind::RolloutRestart, self.restart_on.clone()),
            (ActionKind::ScaleUp, self.scale_up_on.clone()),
            (ActionKind::RolloutUndo, self.undo_on.clone()),
        ]
    }

    /// What each action is done to, for [`super::targets`].
    pub(super) fn targets(&self) -> Vec<(ActionKind, Option<String>)> {
        let pods = |action| (action == ActionKind::ScaleUp).then_some(self.replicas_max);
        let of = |action| digest(&(&self.server, &self.namespace, &self.deployment, pods(action)));
        let listed = self
            .configured()
            .into_iter()
            .filter(|(_, classes)| !classes.is_empty());
        listed.map(|(action, _)| (action, of(action))).collect()
    }

    /// The hands; nothing where neither the file nor the environment tells where the API server is.
    #[cfg(feature = "kubernetes")]
    pub(crate) fn hands(&self) -> Option<theriac_heal::executor::kubernetes::KubernetesHands> {
        use theriac_heal::executor::kubernetes::{ApiServer, KubernetesHands};
        let told = || {
            let host = std::env::var("KUBERNETES_SERVICE_HOST").ok()?;
            let port = std::env::var("KUBERNETES_SERVICE_PORT").ok()?;
            Some((host, port.parse().ok()?))
        };
        let (host, port) = match &self.server {
            Some(server) => host_and_port(server)?,
            None => told()?,
        };
        Some(KubernetesHands {
            api: ApiServer {
                host,
                port,
                ca_file: self.ca_file.clone(),
                token_file: self.token_file.clone(),
            },
            namespace: self.namespace.clone(),
            deployment: self.deployment.clone(),
            replicas_max: self.replicas_max,
            timeout: self.timeout,
            poll: Duration::from_secs(1),
        })
    }
}

fn ca_file() -> PathBuf {
    "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt".into()
}

fn token_file() -> PathBuf {
    "/var/run/secrets/kubernetes.io/serviceaccount/token".into()
}

fn timeout() -> Duration {
    Duration::from_secs(90)
}

#[cfg(test)]
mod tests {
    use super::super::tests::check_text;
    use super::*;

    fn text(more: &str) -> String {
        format!(
            "[[service]]\nname = 'kv'\nargv = ['true']\n[service.kubernetes]\nnamespace = 'shop'\ndeployment = 'web'\n{more}\n"
        )
    }

    #[test]
    fn a_deployment_is_touched_for_named_classes_by_builds_that_can() {
        let config = check_text(&text(
            "restart_on = ['hang']\nscale_up_on = ['overload']\nreplicas_max = 5",
        ));
        if cfg!(feature = "kubernetes") {
            let healing = &config.unwrap().services[0].healing;
            assert_eq!(
                healing.configured_for(FaultClass::Overload),
                [ActionKind::ScaleUp]
            );
            for bad in [
                "",
                "restart_on = ['dependency_down']",
                "scale_up_on = ['overload']",
                "restart_on = ['hang']\nserver = 'https://a'",
                "restart_on = ['hang']\ntimeout = '1h'",
            ] {
                assert!(check_text(&text(bad)).is_err(), "{bad}");
            }
        } else {
            let error = config.unwrap_err().to_string();
            assert!(error.contains("--features kubernetes"), "{error}");
        }
        let escaped = text("restart_on = ['hang']").replace("'web'", "'web/scale'");
        assert!(
            check_text(&escaped)
                .unwrap_err()
                .to_string()
                .contains("no name of an object")
        );
    }
}
