//! A hostile edge: the real edge with a real certificate, whose updates are changed after they were clipped and
//! noised. It stands for a site whose program was replaced.

use std::sync::Arc;

use theriac_edge::config::EdgeConfig;
use theriac_edge::{EdgeError, Tamper};

use crate::attack::Attack;
use crate::fleet::interruption;

/// The change that an attack makes to every update.
pub fn tamper(attack: Attack) -> Tamper {
    Arc::new(move |round, values| attack.apply(round, values))
}

/// Runs the edge of `config` with that change until Ctrl-C or TERM.
///
/// # Errors
/// [`EdgeError`] when it cannot start.
pub async fn run(config: EdgeConfig, attack: Attack) -> Result<(), EdgeError> {
    let mut interrupted = interruption();
    tracing::warn!(%attack, "this edge lies about its updates");
    let until = async move {
        // An error means that nobody is left to interrupt; then the signal itself ends the process.
        interrupted
            .wait_for(|interrupted| *interrupted)
            .await
            .map(drop)
            .ok();
    };
    theriac_edge::run(config, Some(tamper(attack)), until).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use theriac_protocol::units::Round;

    #[test]
    fn changes_updates_as_the_attack_says() {
        assert_eq!(tamper(Attack::SIGN_FLIP)(Round(1), vec![1.0, -2.0]), [-5.0, 10.0]);
    }
}
