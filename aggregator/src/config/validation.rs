//! `rounds.validators` and the keys beside it.

use std::collections::BTreeSet;
use std::time::Duration;

use theriac_protocol::units::NodeId;

use super::{ConfigError, Settings, span, wrong};
use crate::validation::{VALIDATORS_MAX, ValidationTerms};

impl Settings {
    /// Who tries a model before its publication; `None`: nobody.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub(super) fn check_validation(&self) -> Result<Option<ValidationTerms>, ConfigError> {
        let rounds = &self.rounds;
        span(
            "rounds.validation_timeout",
            rounds.validation_timeout,
            Duration::from_secs(1),
            Duration::from_hours(1),
        )?;
        let key = "rounds.validators";
        let mut validators = BTreeSet::new();
        for name in &rounds.validators {
            let node = NodeId::new(name.clone()).map_err(|_| {
                wrong(
                    key,
                    format!("`{name}` is no site's name: use 1 to 63 characters of a-z, 0-9 and -"),
                )
            })?;
            if !validators.insert(node) {
                return Err(wrong(key, format!("`{name}` is in it twice")));
            }
        }
        if validators.len() > VALIDATORS_MAX {
            let found = validators.len();
            return Err(wrong(key, format!("{found} sites, {VALIDATORS_MAX} at most")));
        }
        if !validators.is_empty() && self.model.dimension.is_some() {
            return Err(wrong(
                key,
                "a model of bare numbers (model.dimension) forecasts nothing that a site could try: leave one of the two out".into(),
            ));
        }
        Ok((!validators.is_empty()).then(|| ValidationTerms {
            validators: validators.into_iter().collect(),
            timeout: rounds.validation_timeout,
            missing: rounds.validation_missing,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::validation::Missing;

    fn check(rounds: &str) -> Result<Option<ValidationTerms>, ConfigError> {
        let settings: Settings = toml::from_str(&format!("federation = \"demo\"\n{rounds}")).unwrap();
        settings.check(Path::new("/")).map(|config| config.validation)
    }

    #[test]
    fn without_validators_there_is_no_gate_and_with_them_silence_holds_a_model_back() {
        assert_eq!(check("").unwrap(), None);
        let terms = check("[rounds]\nvalidators = [\"b\", \"a\"]").unwrap().unwrap();
        let names: Vec<&str> = terms.validators.iter().map(NodeId::as_str).collect();
        assert_eq!((names, terms.missing), (vec!["a", "b"], Missing::Hold));
        assert_eq!(terms.timeout, Duration::from_secs(30));
    }

    #[test]
    fn names_times_and_models_that_cannot_be_are_refused_by_their_key() {
        let many: Vec<String> = (0..=VALIDATORS_MAX).map(|at| format!("\"v{at}\"")).collect();
        let many = format!("[rounds]\nvalidators = [{}]", many.join(","));
        for (text, says) in [
            ("[rounds]\nvalidators = [\"No\"]", "`No` is no site's name"),
            ("[rounds]\nvalidators = [\"a\", \"a\"]", "twice"),
            (many.as_str(), "16 at most"),
            (
                "[rounds]\nvalidators = [\"a\"]\nvalidation_timeout = \"1ms\"",
                "1ms",
            ),
            (
                "[rounds]\nvalidators = [\"a\"]\nkind = \"delta\"\n[model]\ndimension = 10",
                "bare numbers",
            ),
        ] {
            let error = check(text).unwrap_err().to_string();
            assert!(
                error.starts_with("rounds.valid") && error.contains(says),
                "{text}: {error}"
            );
        }
    }
}
