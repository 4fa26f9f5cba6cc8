//! The privacy loss of one step, on a grid, never smaller than it is ("connect the dots").
//!
//! For outputs with densities P and Q on two neighbouring data sets the privacy loss is ln(P/Q) under P. Each cell of the grid has mass P and Q;
//! both are moved to the cell's ends so that each total stays. The hockey-stick divergence δ(ε) is then exact on the grid points and a chord
//! between them; it is convex in e^ε, so the chord lies above it (Doroshenko, Ghazi, Kamath, Kumar and Manurangsi 2022, theorem 3.4). Unlike
//! rounding upwards this adds no drift, so that many steps stay tight.

use super::gaussian::SubsampledGaussian;
use super::normal::between;

/// Which of two neighbours is the first: a unit more or a unit less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// P is with the unit.
    Remove,
    /// P is without it.
    Add,
}

/// Mass `exp(ln_masses[i])` at loss `(first + i)·step`, and `infinite` beyond all.
#[derive(Debug)]
pub(super) struct LossGrid {
    pub(super) first: i64,
    pub(super) step: f64,
    pub(super) ln_masses: Vec<f64>,
    pub(super) infinite: f64,
}

impl LossGrid {
    /// The loss of an entry.
    pub(super) fn loss(&self, index: usize) -> f64 {
        (self.first + index.cast_signed() as i64) as f64 * self.step
    }
}

/// x ↦ ln(P/Q) of a step: `L(x) = ln(1 − q + q exp((2x − 1)/2σ²))`, rising in x.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loss {
    sigma: f64,
    rate: f64,
    /// Outputs beyond ± this many σ are left to the ends.
    reach: f64,
}

impl Loss {
    /// Mass beyond the grid is at most `tail`.
    pub(super) fn new(mechanism: SubsampledGaussian, tail: f64) -> Self {
        Self {
            sigma: mechanism.ratio(),
            rate: mechanism.rate().value(),
            // Q(z) ≤ exp(−z²/2)/2.
            reach: (-2.0 * tail.max(f64::MIN_POSITIVE).ln()).sqrt(),
        }
    }

    /// Losses between which the grid lies, in a direction.
    pub(super) fn range(self, direction: Direction) -> (f64, f64) {
        let low = self.at(-self.reach * self.sigma);
        let high = self.at(1.0 + self.reach * self.sigma);
        match direction {
            Direction::Remove => (low, high),
            Direction::Add => (-high, -low),
        }
    }

    /// The step's losses on a grid of width `step`.
    pub(super) fn grid(self, direction: Direction, step: f64) -> LossGrid {
        let (low, high) = self.range(direction);
        let (first, last) = (
            whole((low / step).floor()),
            whole((high / step).ceil()).max(whole((low / step).floor()) + 1),
        );
        let cells = usize::try_from(last - first).unwrap_or(0);
        let mut masses = vec![0.0; cells + 1];
        let point = |index: i64| self.output(direction, index as f64 * step);
        let mut edge = point(first);
        // What lies below the grid counts as its lowest loss.
        masses[0] = self.mass(direction, outside(direction, edge, true));
        let scale = -(-step).exp_m1();
        for index in 0..cells {
            let at = first + i64::try_from(index).unwrap_or(i64::MAX);
            let next = point(at + 1);
            let (mass, upper) = self.cell(direction, at as f64 * step, edge, next);
            let right = (upper / scale).clamp(0.0, mass);
            // What is not a number goes to the larger loss.
            let right = if right.is_nan() { mass } else { right };
            masses[index] += mass - right;
            masses[index + 1] += right;
            edge = next;
        }
        LossGrid {
            first,
            step,
            ln_masses: masses.into_iter().map(f64::ln).collect(),
            infinite: self.mass(direction, outside(direction, edge, false)),
        }
    }

    /// L(x).
    fn at(self, x: f64) -> f64 {
        let exponent = (2.0 * x - 1.0) / (2.0 * self.sigma * self.sigma);
        if self.rate >= 1.0 {
            exponent
        } else if exponent > 30.0 {
            exponent + self.rate.ln() + ((1.0 - self.rate) / self.rate * (-exponent).exp()).ln_1p()
        } else {
            (self.rate * exponent.exp_m1()).ln_1p()
        }
    }

    /// The output x with that loss; −∞ (in [`Direction::Add`] read from the other side) below the least loss.
    fn output(self, direction: Direction, loss: f64) -> f64 {
        let loss = match direction {
            Direction::Remove => loss,
            Direction::Add => -loss,
        };
        let exponent = if self.rate >= 1.0 {
            loss
        } else if loss > 30.0 {
            loss - self.rate.ln() + (-(1.0 - self.rate) * (-loss).exp()).ln_1p()
        } else {
            let inside = loss.exp_m1() / self.rate;
            if inside <= -1.0 {
                return f64::NEG_INFINITY;
            }
            inside.ln_1p()
        };
        self.sigma * self.sigma * exponent + 0.5
    }

    /// P of an interval of outputs.
    fn mass(self, direction: Direction, (low, high): (f64, f64)) -> f64 {
        let (without, with) = self.masses(low, high);
        match direction {
            Direction::Remove => (1.0 - self.rate) * without + self.rate * with,
            Direction::Add => without,
        }
    }

    /// N(0, σ²) and N(1, σ²) of an interval.
    fn masses(self, low: f64, high: f64) -> (f64, f64) {
        let sigma = self.sigma;
        (
            between(low / sigma, high / sigma),
            between((low - 1.0) / sigma, (high - 1.0) / sigma),
        )
    }

    /// P of the cell that begins at loss `loss`, and P − e^loss Q.
    fn cell(self, direction: Direction, loss: f64, edge: f64, next: f64) -> (f64, f64) {
        let q = self.rate;
        // The likelihood ratio of the two normal densities at the cell's lower loss.
        let ratio = ((2.0 * edge - 1.0) / (2.0 * self.sigma * self.sigma)).exp();
        match direction {
            Direction::Remove => {
                let (without, with) = self.masses(edge, next);
                // e^loss − (1 − q), which is q · ratio unless no output has a loss that low.
                let excess = if edge == f64::NEG_INFINITY {
                    loss.exp_m1() + q
                } else {
                    q * ratio
                };
                ((1.0 - q) * without + q * with, q * with - excess * without)
            }
            Direction::Add => {
                let (without, with) = self.masses(next, edge);
                // e^−loss − (1 − q) = q · ratio, so P − e^loss Q = e^loss q (ratio · without − with).
                (without, loss.exp() * q * (ratio * without - with))
            }
        }
    }
}

/// The outputs whose loss lies below (`under`) or above `edge`.
fn outside(direction: Direction, edge: f64, under: bool) -> (f64, f64) {
    if (direction == Direction::Remove) == under {
        (f64::NEG_INFINITY, edge)
    } else {
        (edge, f64::INFINITY)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "grid indices stay far below 2^53; larger ones saturate"
)]
fn whole(value: f64) -> i64 {
    value as i64
}

#[cfg(test)]
mod tests {
    use theriac_protocol::units::NoiseMultiplier;

    use super::*;
    use crate::accountant::SamplingRate;
    use crate::accountant::normal::upper_tail;

    /// The hockey-stick divergence by its definition, from normal tails.
    fn hockey_stick(sigma: f64, q: f64, direction: Direction, epsilon: f64) -> f64 {
        let mechanism = SubsampledGaussian::new(
            NoiseMultiplier::new(sigma).unwrap(),
            SamplingRate::new(q).unwrap(),
        );
        let x = Loss::new(mechanism, 1e-18).output(direction, epsilon);
        let (without, with) = match direction {
            Direction::Remove => (upper_tail(x / sigma), upper_tail((x - 1.0) / sigma)),
            Direction::Add => (upper_tail(-x / sigma), upper_tail((1.0 - x) / sigma)),
        };
        let mixture = (1.0 - q) * without + q * with;
        match direction {
            Direction::Remove => mixture - epsilon.exp() * without,
            Direction::Add => without - epsilon.exp() * mixture,
        }
    }

    #[test]
    fn the_grid_is_exact_on_its_points_and_above_between_them() {
        for (sigma, q) in [(0.5, 0.01), (1.27, 1.0), (3.0, 0.3), (0.8, 0.999)] {
            for direction in [Direction::Remove, Direction::Add] {
                let mechanism = SubsampledGaussian::new(
                    NoiseMultiplier::new(sigma).unwrap(),
                    SamplingRate::new(q).unwrap(),
                );
                let grid = Loss::new(mechanism, 1e-16).grid(direction, 0.05);
                let entries = || {
                    let masses = grid.ln_masses.iter().map(|ln_mass| ln_mass.exp());
                    masses.enumerate().map(|(index, mass)| (grid.loss(index), mass))
                };
                let total: f64 = entries().map(|(_, mass)| mass).sum::<f64>() + grid.infinite;
                assert!((total - 1.0).abs() < 1e-12, "mass {total}");
                let of_grid = |epsilon: f64| {
                    let above = entries().filter(|(loss, _)| *loss > epsilon);
                    above
                        .map(|(loss, mass)| mass * -(epsilon - loss).exp_m1())
                        .sum::<f64>()
                        + grid.infinite
                };
                for index in [1_i64, 2, 5, 11] {
                    let on = index as f64 * 0.05;
                    let exact = hockey_stick(sigma, q, direction, on);
                    assert!(
                        (of_grid(on) - exact).abs() < 1e-12,
                        "σ {sigma}, q {q}, {direction:?}, ε {on}: {} {exact}",
                        of_grid(on)
                    );
                    let off = on + 0.021;
                    assert!(of_grid(off) >= hockey_stick(sigma, q, direction, off) - 1e-14);
                }
            }
        }
    }
}
