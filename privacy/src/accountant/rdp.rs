//! Rényi differential privacy (RDP) on a fixed list of orders: the number that the ledger keeps.
//!
//! An RDP curve says for each order a > 1 how large the Rényi divergence between the outputs of two neighbouring data sets can
//! be. Curves of releases that read the same unit **add**, also when later releases are chosen by what earlier ones showed (Mironov 2017,
//! proposition 1). For any order, a curve gives ε at δ:
//! `ε = RDP(a) + ln(1 − 1/a) − (ln δ + ln a)/(a − 1)` (Canonne, Kamath and Steinke 2020, proposition 12). Each order is a
//! sound bound, so the least one is taken.
//!
//! Why whole orders: the discrete Gaussian has the continuous one's moments `E[(p/q)^k]` as upper bounds (Canonne, Kamath and Steinke 2020,
//! theorem 4), and for a whole order the divergence of the subsampled mechanism is a binomial sum of just such moments. So the
//! bound that is computed for continuous noise holds for the noise that is added.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use theriac_protocol::units::Delta;

/// Number of orders.
pub const ORDER_COUNT: usize = 71;

/// The orders of every curve: 2 to 64, then wider. Too few large ones would overstate a small ε, too few small ones a large ε.
pub const ORDERS: [u32; ORDER_COUNT] = orders();

/// RDP at each of [`ORDERS`]: values at least 0, possibly infinite, never NaN.
#[derive(Debug, Clone, PartialEq)]
pub struct RdpCurve([f64; ORDER_COUNT]);

/// The least ε of a curve, and the order that proves it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RdpEpsilon {
    /// ε at the δ that was asked for; at least 0, infinite when nothing can be said, never NaN.
    pub epsilon: f64,
    /// The order.
    pub order: u32,
}

impl RdpCurve {
    /// Nothing was released.
    pub const ZERO: Self = Self([0.0; ORDER_COUNT]);

    /// A value for each order; what is no loss at all (NaN, below 0) becomes infinite.
    pub fn from_orders(f: impl Fn(u32) -> f64) -> Self {
        Self(ORDERS.map(|order| loss(f(order))))
    }

    /// The values, in the order of [`ORDERS`].
    pub fn values(&self) -> &[f64; ORDER_COUNT] {
        &self.0
    }

    /// Loss of two releases that read the same unit.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| loss(self.0[i] + other.0[i])))
    }

    /// Loss of `count` such releases.
    #[must_use]
    pub fn times(&self, count: u64) -> Self {
        if count == 0 {
            return Self::ZERO;
        }
        Self(self.0.map(|value| loss(value * count as f64)))
    }

    /// The larger value at each order. Its ε is at least that of either curve, so it is a bound for both;
    /// the exact figure of several units is the largest of their own ε.
    #[must_use]
    pub fn max(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].max(other.0[i])))
    }

    /// Whether every value is finite.
    pub fn is_finite(&self) -> bool {
        self.0.iter().all(|value| value.is_finite())
    }

    /// The least ε at `delta` that any order proves.
    pub fn epsilon(&self, delta: Delta) -> RdpEpsilon {
        let curve = ORDERS.iter().map(|order| f64::from(*order)).zip(self.0);
        let (epsilon, order) = least_epsilon(curve, delta.value());
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "one of ORDERS comes back as it went in"
        )]
        let order = order as u32;
        RdpEpsilon { epsilon, order }
    }
}

impl Default for RdpCurve {
    fn default() -> Self {
        Self::ZERO
    }
}

/// An array of 71 numbers; an infinite one, for which JSON has no word, is `null`.
impl Serialize for RdpCurve {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|value| value.is_finite().then_some(*value)))
    }
}

impl<'de> Deserialize<'de> for RdpCurve {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values = Vec::<Option<f64>>::deserialize(deserializer)?;
        let found = values.len();
        let values: [Option<f64>; ORDER_COUNT] = values.try_into().map_err(|_| {
            serde::de::Error::custom(format!("an RDP curve has {ORDER_COUNT} orders, found {found}"))
        })?;
        if values
            .iter()
            .flatten()
            .any(|value| !value.is_finite() || *value < 0.0)
        {
            return Err(serde::de::Error::custom(
                "an RDP value is below 0 or not a number",
            ));
        }
        Ok(Self(values.map(|value| value.unwrap_or(f64::INFINITY))))
    }
}

/// The least ε at `delta` over `(order, RDP)` pairs, and its order; orders above 1, in any number.
pub(super) fn least_epsilon(curve: impl Iterator<Item = (f64, f64)>, delta: f64) -> (f64, f64) {
    let bounds = curve.map(|(order, rdp)| (epsilon_at(order, rdp, delta), order));
    let least = bounds.fold((f64::INFINITY, 0.0), |best, bound| {
        // The first order stands for a curve that is infinite everywhere.
        if bound.0 < best.0 || best.1 == 0.0 {
            bound
        } else {
            best
        }
    });
    // Upwards, so that rounding of the conversion never favours us.
    (least.0 * (1.0 + 4.0 * f64::EPSILON), least.1)
}

fn epsilon_at(order: f64, rdp: f64, delta: f64) -> f64 {
    if !rdp.is_finite() {
        return f64::INFINITY;
    }
    // Total variation is at most sqrt(1 - exp(-KL)) (Bretagnolle and Huber), and KL is at most any RDP.
    if rdp == 0.0 || delta * delta + (-rdp).exp_m1() > 0.0 {
        return 0.0;
    }
    let epsilon = rdp + (-1.0 / order).ln_1p() - (delta.ln() + order.ln()) / (order - 1.0);
    loss(epsilon.max(0.0))
}

/// What is no loss counts as infinite.
fn loss(value: f64) -> f64 {
    if value >= 0.0 { value } else { f64::INFINITY }
}

const fn orders() -> [u32; ORDER_COUNT] {
    let mut orders = [0; ORDER_COUNT];
    let mut index = 0;
    let mut order = 2;
    while order <= 64 {
        orders[index] = order;
        index += 1;
        order += 1;
    }
    let wider = [80, 96, 128, 192, 256, 384, 512, 1024];
    let mut next = 0;
    while next < wider.len() {
        orders[index] = wider[next];
        index += 1;
        next += 1;
    }
    orders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(value: f64) -> Delta {
        Delta::new(value).unwrap()
    }

    #[test]
    fn orders_are_those_of_the_guarantee() {
        assert_eq!((ORDERS[0], ORDERS[62], ORDERS[63], ORDERS[70]), (2, 64, 80, 1024));
        assert!(ORDERS.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn curves_add_multiply_and_take_the_larger() {
        let one = RdpCurve::from_orders(f64::from);
        let flat = RdpCurve::from_orders(|_| 10.0);
        assert_eq!(one.plus(&one), one.times(2));
        assert_eq!(
            (one.times(0), one.plus(&RdpCurve::ZERO)),
            (RdpCurve::ZERO, one.clone())
        );
        let most = one.max(&flat);
        assert!((most.values()[0] - 10.0).abs() < 1e-15 && (most.values()[70] - 1024.0).abs() < 1e-12);
        let d = delta(1e-6);
        assert!(most.epsilon(d).epsilon >= one.epsilon(d).epsilon.max(flat.epsilon(d).epsilon));
    }

    #[test]
    fn overflow_is_infinite_and_never_nan() {
        let huge = RdpCurve::from_orders(|_| f64::MAX);
        for curve in [
            huge.plus(&huge),
            huge.times(u64::MAX),
            RdpCurve::from_orders(|_| f64::NAN),
        ] {
            assert!(curve.values().iter().all(|value| *value == f64::INFINITY));
            assert_eq!(
                curve.epsilon(delta(1e-6)),
                RdpEpsilon {
                    epsilon: f64::INFINITY,
                    order: 2
                }
            );
        }
        for value in [0.0, f64::MIN_POSITIVE, 1e-300, 1e-17, 1e17, 1e300, f64::MAX] {
            for d in [f64::MIN_POSITIVE, 1e-300, 1e-6, 0.999_999] {
                let epsilon = RdpCurve::from_orders(|_| value).epsilon(delta(d)).epsilon;
                assert!(epsilon >= 0.0, "RDP {value}, delta {d}: {epsilon}");
            }
        }
    }

    #[test]
    fn json_keeps_every_bit_and_refuses_what_is_no_curve() {
        let mut curve = RdpCurve::from_orders(|order| f64::from(order) / 3.0);
        curve.0[70] = f64::INFINITY;
        let text = serde_json::to_string(&curve).unwrap();
        assert_eq!(serde_json::from_str::<RdpCurve>(&text).unwrap(), curve);
        for bad in ["[]".to_owned(), "[1.0]".to_owned(), text.replace("[0.6", "[-0.6")] {
            assert!(serde_json::from_str::<RdpCurve>(&bad).is_err(), "{bad}");
        }
    }
}
