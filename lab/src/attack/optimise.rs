//! Attacks whose strength is chosen against the deployed rule (Shejwalkar and Houmansadr 2021, section IV; the search is the one
//! of `ByzFL`).

use super::Scene;
use super::statistics::distance_squared;

/// How often the deployed rule is asked.
const EVALUATIONS: usize = 20;

/// First step.
const STEP: f64 = 10.0;

/// By how much a step shrinks that led nowhere.
const RATIO: f64 = 0.8;

/// The rows whose strength moves the deployed rule farthest from the honest mean. Never worse than strength 0.
pub fn against(scene: &Scene<'_>, mean: &[f32], rows: impl Fn(f32) -> Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let harm = |strength: f64| {
        let result = (scene.deployed)(&rows(super::statistics::narrow(strength)));
        result.map_or(0.0, |values| distance_squared(&values, mean).sqrt())
    };
    rows(super::statistics::narrow(line_search(harm)))
}

/// The non-negative place of the largest value found: steps grow twofold while they lead up, then shrink around the best.
pub fn line_search(value: impl Fn(f64) -> f64) -> f64 {
    let (mut best, mut highest, mut step) = (0.0_f64, value(0.0), STEP);
    let (mut left, mut place) = (EVALUATIONS - 1, 0.0);
    while left > 0 {
        place = best + step;
        left -= 1;
        let here = value(place);
        if here > highest {
            (best, highest) = (place, here);
            step *= 2.0;
        } else {
            step *= RATIO;
            break;
        }
    }
    while left > 0 {
        if place < best {
            place += step;
        } else {
            let mut below = place - step;
            while below < 0.0 {
                below = f64::midpoint(below, place);
            }
            place = below;
        }
        left -= 1;
        let here = value(place);
        if here > highest {
            (best, highest) = (place, here);
        }
        step *= RATIO;
    }
    best
}
