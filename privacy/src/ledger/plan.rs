//! What a policy allows of a plan, whatever was charged before.

use std::ops::RangeInclusive;
use std::time::Duration;

use theriac_protocol::message::UpdateKind;
use theriac_protocol::units::Timestamp;

use super::charges::to_ranges;
use super::state::reads_everything;
use super::{BLOCKS_MAX, ReleasePlan, ReserveError, VALUES_MAX};
use crate::policy::{Policy, PrivacyUnit};

/// Checks what does not depend on earlier charges; gives the plan's blocks as runs.
pub(crate) fn check(
    policy: &Policy,
    plan: &ReleasePlan,
    now: Timestamp,
) -> Result<Vec<(u64, u64)>, ReserveError> {
    allowed(policy, plan)?;
    well_formed(policy.unit(), plan)?;
    windowed(policy, plan)?;
    if let Some(&block) = plan.blocks.iter().find(|block| is_too_old(policy, **block, now)) {
        return Err(ReserveError::BlockTooOld { block });
    }
    if reads_everything(policy.unit(), plan.kind, plan.blocks.len()) {
        return Ok(Vec::new());
    }
    to_ranges(&plan.blocks).ok_or(ReserveError::BadPlan("block ids must strictly ascend"))
}

/// What the policy says.
fn allowed(policy: &Policy, plan: &ReleasePlan) -> Result<(), ReserveError> {
    if !policy.allows(plan.kind) {
        return Err(ReserveError::KindNotAllowed { kind: plan.kind });
    }
    let (expected, found) = (
        policy.noise_multiplier_min().value(),
        plan.noise_multiplier.value(),
    );
    if found < expected {
        return Err(ReserveError::TermsTooWeak { expected, found });
    }
    let (expected, found) = (policy.sampling_rate_max(), plan.sampling_rate);
    if found > expected {
        return Err(ReserveError::SamplingRateTooHigh { expected, found });
    }
    let (expected, found) = (policy.steps_max(), plan.steps);
    if found > expected {
        return Err(ReserveError::TooManySteps { expected, found });
    }
    if plan.block_span != policy.block_span() {
        let (expected_ms, found_ms) = (policy.block_span().as_millis(), plan.block_span.as_millis());
        return Err(ReserveError::OtherBlocks {
            expected_ms,
            found_ms,
        });
    }
    Ok(())
}

/// Windows are the policy's, and of blocks that are named.
fn windowed(policy: &Policy, plan: &ReleasePlan) -> Result<(), ReserveError> {
    let Some(windows) = plan.windows else {
        return if policy.unit() == PrivacyUnit::Record
            && plan.kind == UpdateKind::Delta
            && !plan.blocks.is_empty()
        {
            Err(ReserveError::BadPlan(
                "steps on single blocks hide a record only where blocks are cut into windows",
            ))
        } else {
            Ok(())
        };
    };
    if policy.record_windows() != Some(windows.of_any_block()) {
        return Err(ReserveError::BadPlan("the windows are not those of the policy"));
    }
    if plan.blocks.is_empty() {
        return Err(ReserveError::BadPlan(
            "windows are cut from blocks that the plan names",
        ));
    }
    Ok(())
}

/// What every plan must be.
fn well_formed(unit: PrivacyUnit, plan: &ReleasePlan) -> Result<(), ReserveError> {
    if plan.values == 0 || plan.values > VALUES_MAX {
        return Err(ReserveError::BadPlan("a release holds 1 to 16777216 values"));
    }
    if !CLIP_NORM.contains(&plan.clip_norm.value()) {
        return Err(ReserveError::BadPlan(
            "the clipping norm must lie between 1e-9 and 1e12",
        ));
    }
    if !(plan.sampling_rate > 0.0 && plan.sampling_rate <= 1.0) || plan.steps == 0 {
        return Err(ReserveError::BadPlan(
            "a release has at least one step, each of a sampling rate above 0 and at most 1",
        ));
    }
    if plan.blocks.len() > BLOCKS_MAX {
        return Err(ReserveError::BadPlan("one release reads at most 262144 blocks"));
    }
    if unit == PrivacyUnit::Node {
        return if plan.blocks.is_empty() {
            Ok(())
        } else {
            Err(ReserveError::BadPlan(
                "a centre charges every node and names no blocks",
            ))
        };
    }
    let one_step = plan.steps == 1 && plan.sampling_rate >= 1.0;
    match plan.kind {
        UpdateKind::Moments | UpdateKind::Gradient if plan.blocks.is_empty() => Err(ReserveError::NoBlocks),
        UpdateKind::Moments if !one_step => {
            Err(ReserveError::BadPlan("moments are one release of whole blocks"))
        }
        UpdateKind::Gradient if !one_step => Err(ReserveError::BadPlan(
            "a round of gradients is one release of whole blocks; every round is charged on its own",
        )),
        UpdateKind::Delta if plan.blocks.is_empty() && plan.sampling_rate < 1.0 => Err(
            ReserveError::BadPlan("a change made of all data names no blocks, so none can be sampled"),
        ),
        UpdateKind::Moments | UpdateKind::Gradient | UpdateKind::Delta => Ok(()),
    }
}

/// Whether the block's end lies further back than the policy's retention.
pub(crate) fn is_too_old(policy: &Policy, block: u64, now: Timestamp) -> bool {
    let end = (u128::from(block) + 1) * policy.block_span().as_millis();
    let kept = |retention: Duration| end + retention.as_millis() >= u128::from(now.0);
    policy.retention().is_some_and(|retention| !kept(retention))
}

const CLIP_NORM: RangeInclusive<f64> = 1e-9..=1e12;
