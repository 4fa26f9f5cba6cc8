//! `[service.space]`: what makes room on the file system of `state.dir` when it is full.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use theriac_command::settings;

use super::{ConfigError, ServiceConfig, StateSettings, wrong};

/// `[service.space]`: what makes room on the file system of `state.dir` when it is full.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SpaceSettings {
    /// Directories whose files can be made again: caches, rotated logs. Never in or above a service's state or the edge's `state_dir`,
    /// by whatever name, but for `log` and `pg_log` in this service's own.
    pub relieve: Vec<PathBuf>,
    /// Where they are moved to, on another file system; a directory for each service and action.
    pub quarantine: PathBuf,
    /// Files that were written less than this ago stay. Default `10m`, 0 s to 1 year.
    #[serde(default = "default_space_age", with = "settings::duration")]
    pub min_age: Duration,
}

impl SpaceSettings {
    pub(super) fn wrong(&self, state: Option<&StateSettings>) -> Option<(&'static str, String)> {
        let Some(state) = state else {
            return Some((
                "space",
                "there is no [service.state]: its disk is the one that is watched".to_owned(),
            ));
        };
        if self.relieve.is_empty() {
            return Some(("space.relieve", "is empty: list a directory".to_owned()));
        }
        if self.min_age > Duration::from_hours(8_766) {
            return Some(("space.min_age", "is above 1 year".to_owned()));
        }
        // Of a server's data directory its log alone can be made again.
        let log = |path: &Path| path == state.dir.join("log") || path == state.dir.join("pg_log");
        let bad = self.relieve.iter().find(|path| {
            let inside = path.starts_with(&state.dir) && !log(path);
            let round = state.dir.starts_with(path) || self.quarantine.starts_with(path);
            !path.is_absolute() || inside || round || path.components().any(|part| part.as_os_str() == "..")
        });
        if let Some(bad) = bad {
            let words = format!(
                "{} is no absolute path apart from the state and the quarantine",
                bad.display()
            );
            return Some(("space.relieve", words));
        }
        (!self.quarantine.is_absolute() || self.quarantine.starts_with(&state.dir)).then(|| {
            (
                "space.quarantine",
                "is no absolute path apart from the state".to_owned(),
            )
        })
    }
}

/// What may be moved away lies apart from every state and from what the edge keeps. By name alone: what links and mounts make of the
/// names is seen at the action ([`theriac_heal::executor::space`]).
pub(super) fn check_all(services: &[ServiceConfig], state_dir: &Path) -> Result<(), ConfigError> {
    let full = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for service in services {
        let Some(space) = &service.space else { continue };
        let key = |field: &str| format!("service `{}`, space.{field}", service.name);
        let states = services
            .iter()
            .filter(|other| other.name != service.name)
            .filter_map(|other| {
                Some((
                    format!("state.dir of `{}`", other.name),
                    full(&other.state.as_ref()?.dir),
                ))
            });
        let states: Vec<(String, PathBuf)> = states.collect();
        let edge = ("the edge's state_dir".to_owned(), full(state_dir));
        for listed in &space.relieve {
            for (name, dir) in states.iter().chain([&edge]) {
                if listed.starts_with(dir) || dir.starts_with(listed) {
                    let words = format!(
                        "{} overlaps with {name}, {}: list directories whose files can be made again",
                        listed.display(),
                        dir.display()
                    );
                    return Err(wrong(key("relieve"), words));
                }
            }
        }
        if let Some((name, _)) = states.iter().find(|(_, dir)| space.quarantine.starts_with(dir)) {
            return Err(wrong(key("quarantine"), format!("lies in {name}")));
        }
    }
    Ok(())
}

fn default_space_age() -> Duration {
    Duration::from_mins(10)
}

#[cfg(test)]
mod tests {
    use super::super::{EdgeConfig, EdgeSettings};

    #[test]
    fn what_may_be_moved_away_lies_apart_from_the_state_and_the_quarantine() {
        let load = |space: &str| {
            let text = format!(
                "[[service]]\nname = 'kv'\nargv = ['true']\nstate = {{ dir = '/data/kv' }}\nspace = {{ {space} }}\n"
            );
            let settings: EdgeSettings = toml::from_str(&text).map_err(|error| error.to_string())?;
            EdgeConfig::check(settings, &|_| None).map_err(|error| error.to_string())
        };
        assert!(load("relieve = ['/data/cache', '/data/kv/log'], quarantine = '/spare/q'").is_ok());
        for (space, word) in [
            ("relieve = [], quarantine = '/q'", "space.relieve"),
            ("relieve = ['cache'], quarantine = '/q'", "space.relieve"),
            ("relieve = ['/data/kv/wal'], quarantine = '/q'", "space.relieve"),
            ("relieve = ['/data'], quarantine = '/q'", "space.relieve"),
            ("relieve = ['/a/../data/kv'], quarantine = '/q'", "space.relieve"),
            ("relieve = ['/q'], quarantine = '/q/below'", "space.relieve"),
            (
                "relieve = ['/data/cache'], quarantine = '/data/kv/q'",
                "space.quarantine",
            ),
            (
                "relieve = ['/data/cache'], quarantine = '/q', min_age = '9000h'",
                "space.min_age",
            ),
        ] {
            let error = load(space).unwrap_err();
            assert!(error.contains(word), "{space}: {error}");
        }
    }

    #[test]
    fn what_may_be_moved_away_lies_apart_from_other_states_and_from_what_the_edge_keeps() {
        let load = |space: &str| {
            let text = format!(
                "state_dir = '/var/lib/edge'\n\
                 [[service]]\nname = 'kv'\nargv = ['true']\nstate = {{ dir = '/data/kv' }}\nspace = {{ {space} }}\n\
                 [[service]]\nname = 'db'\nargv = ['true']\nstate = {{ dir = '/data/db' }}\n"
            );
            let settings: EdgeSettings = toml::from_str(&text).map_err(|error| error.to_string())?;
            EdgeConfig::check(settings, &|_| None).map_err(|error| error.to_string())
        };
        assert!(load("relieve = ['/var/cache', '/data/kv/log'], quarantine = '/spare'").is_ok());
        for (space, word) in [
            ("relieve = ['/var/lib/edge'], quarantine = '/q'", "state_dir"),
            (
                "relieve = ['/var/lib/edge/checkpoints'], quarantine = '/q'",
                "state_dir",
            ),
            ("relieve = ['/var'], quarantine = '/q'", "state_dir"),
            (
                "relieve = ['/var/cache', '/data/db/base'], quarantine = '/q'",
                "`db`",
            ),
            ("relieve = ['/data/db/log'], quarantine = '/q'", "`db`"),
            ("relieve = ['/var/cache'], quarantine = '/data/db/q'", "`db`"),
        ] {
            let error = load(space).unwrap_err();
            assert!(
                error.contains(word) && error.contains("space."),
                "{space}: {error}"
            );
        }
    }
}
