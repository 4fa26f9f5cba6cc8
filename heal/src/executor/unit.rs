//! Names of things that another manager runs, checked, so that none leads anywhere else.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The full name of a systemd unit, such as `nginx.service`: `systemd.unit(5)`, at most 255 characters, without escapes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UnitName(String);

/// The name of a Kubernetes object or namespace: RFC 1123, a label of at most 63 characters of `a-z`, `0-9` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectName(String);

/// What is no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is no name of {of}")]
pub struct NameError {
    name: String,
    of: &'static str,
}

impl UnitName {
    /// Whether a process with these lines of `/proc/PID/cgroup` is of it, or of something below it.
    pub fn has(&self, cgroups: &str) -> bool {
        let paths = cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2));
        paths.flat_map(|path| path.split('/')).any(|part| part == self.0)
    }

    /// As systemd knows it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for UnitName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        let good = name.rsplit_once('.').is_some_and(|(stem, kind)| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.@".contains(&byte);
            !stem.is_empty() && stem.bytes().all(plain) && KINDS.contains(&kind)
        });
        if good && name.len() <= 255 {
            Ok(Self(name))
        } else {
            let of = "a unit: such as nginx.service, of letters, digits and : - _ . @";
            Err(NameError { name, of })
        }
    }
}

impl TryFrom<String> for ObjectName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let ends = !name.starts_with('-') && !name.ends_with('-');
        if (1..=63).contains(&name.len()) && ends && name.bytes().all(plain) {
            Ok(Self(name))
        } else {
            let of = "an object: 1 to 63 of a-z, 0-9 and -";
            Err(NameError { name, of })
        }
    }
}

impl From<ObjectName> for String {
    fn from(name: ObjectName) -> Self {
        name.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<UnitName> for String {
    fn from(name: UnitName) -> Self {
        name.0
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Those of which a restart makes sense. No targets: to restart `reboot.target` is to reboot.
const KINDS: [&str; 3] = ["service", "socket", "mount"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_taken() {
        let unit = |name: &str| UnitName::try_from(name.to_owned()).is_ok();
        assert!(unit("nginx.service") && unit("postgresql@15-main.service"));
        for bad in [
            "nginx",
            ".service",
            "a b.service",
            "../x.service",
            "a.slice",
            "reboot.target",
            "",
        ] {
            assert!(!unit(bad), "{bad}");
        }
        let own = UnitName::try_from("edge.service".to_owned()).unwrap();
        assert!(own.has("4:cpu,cpuacct:/\n0::/system.slice/edge.service/below\n"));
        assert!(!own.has("0::/system.slice/my-edge.service\n") && !own.has(""));
        let object = |name: &str| ObjectName::try_from(name.to_owned()).is_ok();
        assert!(object("web") && object("web-2"));
        for bad in ["", "Web", "a/b", "-a", "a-", "a?b", "a.b"] {
            assert!(!object(bad), "{bad}");
        }
    }
}
