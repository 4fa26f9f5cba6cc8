//! What acts on a service, as its configuration has it.

use std::path::Path;
use std::time::Duration;

use theriac_heal::checkpoint::schedule::Limits;
use theriac_heal::checkpoint::state_check::StateCheck;
use theriac_heal::checkpoint::store::{CheckpointError, CheckpointStore, StoreLimits};
use theriac_heal::executor::cgroup::Hierarchies;
use theriac_heal::executor::hook::Hook;
use theriac_heal::executor::process::{OutputTo, ServiceSpec, Supervisor};
use theriac_heal::executor::service::{ServiceHands, ServiceState};
use theriac_heal::executor::space::SpaceHands;
use theriac_heal::executor::webhook::{SECRET_BYTES_MIN, Webhook};

use super::ServiceContext;
use crate::config::{HookSettings, ServiceConfig, StateSettings, WebhookSettings};
use crate::state_dir::StateDir;
use crate::storage::FREE_MIN;

pub(super) fn hands(context: &ServiceContext) -> Result<ServiceHands, CheckpointError> {
    let config = &context.shared.config;
    let mut spec = ServiceSpec::new(config.name.as_str(), config.argv.clone());
    spec.env.clone_from(&config.env);
    spec.cwd.clone_from(&config.cwd);
    spec.stop_grace = config.stop_grace;
    if let Some(path) = &config.output {
        spec.output = OutputTo::File {
            path: path.clone(),
            bytes_max: OUTPUT_BYTES_MAX,
        };
    }
    if crate::postgres::is_postgres(config)
        && let Some(state) = &config.state
    {
        crate::postgres::supervise(&mut spec, &state.dir);
    }
    spec.listens_on = local_port(config);
    let record = context.dir.root().join(format!("service-{}.json", config.name));
    let state = config
        .state
        .as_ref()
        .map(|state| {
            let checkpoints = open_checkpoints(
                &context.dir,
                config.name.as_str(),
                state,
                crate::postgres::needs_proof(config),
            )?;
            Ok::<_, CheckpointError>(ServiceState {
                dir: state.dir.clone(),
                check: state_check(state),
                checkpoints,
            })
        })
        .transpose()?;
    Ok(ServiceHands {
        supervisor: Supervisor::new(spec, record),
        state,
        hook: config.hook.as_ref().map(hook),
        webhook: config
            .webhook
            .as_ref()
            .and_then(|settings| webhook(context, settings)),
        space: space_hands(context),
        proxy: context.shared.proxy.clone(),
        cgroup: config.cgroup.as_ref().map(|settings| {
            let at = Hierarchies::read().unwrap_or_else(|error| {
                tracing::warn!(service = config.name.as_str(), %error, "no control groups are seen");
                Hierarchies::default()
            });
            settings.hands(at, context.dir.bounds_file(config.name.as_str()))
        }),
        #[cfg(feature = "systemd")]
        systemd: config.systemd.as_ref().map(crate::config::SystemdSettings::hands),
        #[cfg(feature = "kubernetes")]
        kubernetes: config.kubernetes.as_ref().and_then(|settings| {
            let hands = settings.hands();
            if hands.is_none() {
                let service = config.name.as_str();
                tracing::error!(
                    service,
                    "no API server is named, neither in edge.toml nor by the cluster"
                );
            }
            Some((hands?, format!("{}-{}", context.board.status().node, config.name)))
        }),
        sessions: crate::postgres::session_hands(config)
            .filter(|_| config.sessions.is_some())
            .map(|(hands, _)| hands),
    })
}

/// The port of this host that it is asked on; `None` where it is asked over another address, or none.
pub(super) fn local_port(config: &ServiceConfig) -> Option<u16> {
    let url = &config.probe.as_ref()?.url;
    url.is_of_this_host().then(|| url.tcp_port()).flatten()
}

fn hook(settings: &HookSettings) -> Hook {
    Hook {
        argv: settings.argv.clone(),
        env: settings.env.clone(),
        timeout: settings.timeout,
        output_bytes_max: CHECK_OUTPUT_BYTES_MAX,
    }
}

/// Nothing when the secret cannot be used: the action then fails and says so, and the service is healed by the other rungs.
fn webhook(context: &ServiceContext, settings: &WebhookSettings) -> Option<Webhook> {
    let name = &context.shared.name;
    let secret = match read_secret(&settings.secret_file) {
        Ok(secret) => secret,
        Err(error) => {
            let path = settings.secret_file.display();
            tracing::error!(code = "TH-E0373", service = name, %path, %error, "the webhook cannot be signed");
            return None;
        }
    };
    Some(Webhook {
        url: settings.url.parse().ok()?,
        secret,
        node: context.board.status().node,
        timeout: settings.timeout,
        attempts: settings.attempts,
        pause: WEBHOOK_PAUSE,
    })
}

fn read_secret(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read as _;
    use std::os::unix::fs::MetadataExt as _;
    // Opened once: what is checked is what is read, whatever is put in its place meanwhile.
    let file = std::fs::File::open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(std::io::Error::other("it is no file"));
    }
    if found.mode() & 0o077 != 0 {
        return Err(std::io::Error::other("others may read it: chmod 600"));
    }
    let own = rustix::process::geteuid().as_raw();
    if ![0, own].contains(&found.uid()) {
        return Err(std::io::Error::other(
            "it belongs to another user, who can change it",
        ));
    }
    let mut secret = Vec::new();
    file.take(SECRET_FILE_BYTES_MAX).read_to_end(&mut secret)?;
    let secret = secret.trim_ascii().to_vec();
    if secret.len() < SECRET_BYTES_MIN {
        return Err(std::io::Error::other(format!(
            "it is shorter than {SECRET_BYTES_MIN} bytes"
        )));
    }
    Ok(secret)
}

/// What may be moved away when the file system of the service's state is full.
pub(crate) fn space_hands(context: &ServiceContext) -> Option<SpaceHands> {
    let config = &context.shared.config;
    let (space, state) = (config.space.as_ref()?, config.state.as_ref()?);
    Some(SpaceHands {
        on: state.dir.clone(),
        listed: space.relieve.clone(),
        protected: config
            .other_states
            .iter()
            .cloned()
            .chain([context.dir.root().to_owned()])
            .collect(),
        quarantine: space.quarantine.join(&context.shared.name),
        min_age: space.min_age,
        free_bytes_min: state.free_bytes_min.unwrap_or(0),
    })
}

/// The store of one service's checkpoints.
pub(crate) fn open_checkpoints(
    dir: &StateDir,
    service: &str,
    state: &StateSettings,
    needs_proof: bool,
) -> Result<CheckpointStore, CheckpointError> {
    let limits = StoreLimits {
        keep: state.keep,
        needs_proof,
        // A checkpoint is never what makes training and sending stop.
        free_bytes_min: FREE_MIN,
        ..StoreLimits::default()
    };
    let path: &Path = &dir.checkpoints().join(service);
    CheckpointStore::open(path, limits)
}

/// When checkpoints of the state are taken.
pub(crate) fn schedule_limits(state: &StateSettings) -> Limits {
    Limits {
        min_gap: state.min_gap.min(state.interval),
        max_gap: state.interval,
        budget_pct: state.budget_pct,
        expected_mtbf: state.expected_mtbf,
        ..Limits::default()
    }
}

/// The command that says whether the state is sound, where there is one.
pub(crate) fn state_check(state: &StateSettings) -> Option<StateCheck> {
    (!state.check.is_empty()).then(|| StateCheck {
        argv: state.check.clone(),
        timeout: state.check_timeout,
        output_bytes_max: CHECK_OUTPUT_BYTES_MAX,
    })
}

/// Largest output file of a service, in bytes.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;
/// Most output of a state check that is kept as evidence, in bytes.
const CHECK_OUTPUT_BYTES_MAX: usize = 4 << 10;
/// Time before a webhook is tried again.
pub(crate) const WEBHOOK_PAUSE: Duration = Duration::from_millis(500);
/// Most bytes of a file with a webhook's secret that are read.
const SECRET_FILE_BYTES_MAX: u64 = 64 << 10;
