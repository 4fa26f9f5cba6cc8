//! Bounds on groups of processes that an earlier run left in force for a service that has none listed any more.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use theriac_heal::executor::cgroup::{CgroupHands, Gate, Hierarchies};

use crate::config::ServiceConfig;
use crate::state_dir::StateDir;

/// Takes them all back, before anybody acts. What cannot be is told and stays recorded for the next start; a service that has groups listed
/// looks after its own.
pub(crate) fn undo_left(dir: &StateDir, services: &[ServiceConfig]) {
    let kept: BTreeSet<PathBuf> = services
        .iter()
        .filter(|service| service.cgroup.is_some())
        .map(|service| dir.bounds_file(service.name.as_str()))
        .collect();
    let records = match dir.bounds_files() {
        Ok(records) => records,
        Err(error) => {
            tracing::error!(%error, "whether an earlier run left bounds cannot be seen");
            return;
        }
    };
    for record in records.into_iter().filter(|record| !kept.contains(record)) {
        let hands = CgroupHands {
            at: Hierarchies::default(),
            place: None,
            bounds: BTreeMap::new(),
            record,
            gate: Gate::default(),
        };
        match hands.undo(None) {
            Ok(undone) => {
                for words in undone {
                    tracing::info!(words, "a bound of an earlier run was taken back");
                }
            }
            Err(error) => {
                let path = hands.record.display();
                tracing::error!(%path, %error, "a bound of an earlier run was not taken back");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use theriac_heal::executor::cgroup::{Bound, Change, Controller, GroupName, Version};
    use theriac_heal::types::{ActionKind, Now};

    use super::*;
    use crate::config::EdgeConfig;

    /// A group that is frozen for that service, as by a run that died.
    fn freeze(dir: &StateDir, root: &Path, service: &str) -> PathBuf {
        let group = root.join(service);
        std::fs::create_dir(&group).unwrap();
        std::fs::write(group.join("cgroup.freeze"), "0").unwrap();
        let bound = Bound {
            group: GroupName::try_from(service.to_owned()).unwrap(),
            change: Change::Freeze,
            lasts: Duration::from_hours(1),
        };
        let hands = CgroupHands {
            at: Hierarchies::default().with(Controller::Freezer, Version::V2, root.to_owned()),
            place: None,
            bounds: BTreeMap::from([(ActionKind::Freeze, bound)]),
            record: dir.bounds_file(service),
            gate: Gate::default(),
        };
        let now = Now {
            monotonic: Duration::from_secs(1),
            unix_ms: 0,
        };
        hands.act(ActionKind::Freeze, 1, now, "boot").unwrap();
        group.join("cgroup.freeze")
    }

    #[test]
    fn what_was_frozen_for_a_service_that_is_gone_or_lists_nothing_thaws_at_the_next_start() {
        let (home, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dir = StateDir::open(&home.path().join("state")).unwrap();
        let file = home.path().join("edge.toml");
        let text = "[[service]]\nname = 'kv'\nargv = ['true']\n[service.cgroup]\nplace = 'kv'\n\
            [[service]]\nname = 'web'\nargv = ['true']\n";
        std::fs::write(&file, text).unwrap();
        let config = EdgeConfig::load(Some(&file), []).unwrap();
        let frozen = ["kv", "web", "gone"].map(|service| freeze(&dir, root.path(), service));
        undo_left(&dir, &config.services);
        let values = frozen.map(|path| std::fs::read_to_string(path).unwrap());
        assert_eq!(values, ["1", "0", "0"]);
        undo_left(&dir, &config.services);
    }
}
