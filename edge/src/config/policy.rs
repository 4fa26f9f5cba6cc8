//! `[healing_policy]`: a signed policy of healing.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use theriac_privacy::policy::signed::PolicyPublicKey;

use super::{ConfigError, count, wrong};

/// `[healing_policy]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealingPolicySettings {
    /// A signed policy of what may be done to which service (docs/healing.md). Default: none; `[healing]` alone holds then. A
    /// relative path is one from the edge's working directory.
    pub file: Option<PathBuf>,
    /// Public keys (`thpk1_…`) whose signatures count. Default: none. Needed with `file`.
    pub keys: Vec<PolicyPublicKey>,
    /// So many different ones of `keys` must have signed, 1 to their number. Default 1.
    pub need: usize,
}

impl HealingPolicySettings {
    /// So many people have to sign before what stands against a service is lifted: as many as a policy, where there are keys; else 0, for the
    /// word of somebody at the host.
    pub fn lifted_by(&self) -> u32 {
        if self.keys.is_empty() {
            0
        } else {
            u32::try_from(self.need.max(1)).unwrap_or(u32::MAX)
        }
    }
}

impl Default for HealingPolicySettings {
    fn default() -> Self {
        Self {
            file: None,
            keys: Vec::new(),
            need: 1,
        }
    }
}

pub(super) fn check(policy: HealingPolicySettings) -> Result<HealingPolicySettings, ConfigError> {
    if policy.file.is_some() {
        if policy.keys.is_empty() {
            let text = "is empty: a policy file counts only with the signature of a key that is listed here";
            return Err(wrong("healing_policy.keys", text));
        }
        count("healing_policy.need", policy.need, 1, policy.keys.len())?;
    }
    for (at, key) in policy.keys.iter().enumerate() {
        if policy.keys[..at].contains(key) {
            return Err(wrong("healing_policy.keys", format!("{key} is there twice")));
        }
    }
    Ok(policy)
}
