//! The screen for copies under noise: between validation and the rule, an exact one, which no honest edge fails by itself.
//!
//! Two honest updates of `d` values carry independent Gaussian noise of standard deviation s a value, so whatever their signals their distance is
//! stochastically at least that of the noise alone and lies below `√2·s(√d − 5)` with probability below e^(−12.5) (the argument of
//! [`norm_bound`](crate::validate::norm_bound), turned round). Of a nearer pair at least one was made of the other or with it: copies, mimics, one
//! site with many names, or an update with too little noise, which is near to everybody.
//!
//! Nearness is no equivalence, so what goes is a vertex cover of the graph of near pairs (`robust::cover`): of a group of copies one stays, a row that is near to
//! everybody goes alone, and **k hostile rows never remove more than k honest ones**.

use rayon::prelude::*;

use crate::robust::{self, Cover, Options, Rows, RuleError, RuleName, distances_squared, rule};

/// Coordinates of a pair read at once.
const PIECE: usize = 1_024;

/// Most rows that are compared with one another; beyond, nothing is screened.
pub const ROWS_MAX: usize = 1_024;

/// What the screen for copies takes out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Copies {
    /// Rows that go, ascending, and a row that each is near to.
    pub removed: Vec<(usize, usize)>,
    /// At least so many of them are hostile.
    pub hostile: usize,
}

impl Copies {
    /// Whether this row goes.
    pub fn has(&self, row: usize) -> bool {
        self.removed.binary_search_by_key(&row, |(row, _)| *row).is_ok()
    }

    /// Hostile rows to withstand among those that stay, when `byzantine` are assumed among all; never below 1 where any are.
    pub fn left_of(&self, byzantine: usize) -> usize {
        byzantine.saturating_sub(self.hostile).max(byzantine.min(1))
    }

    /// What of it a round of `rows` rows takes, and how many hostile rows its rule then withstands when `byzantine` are assumed: all of it, or nothing where so few
    /// rows would be left that the rule withstood fewer than it does without the screen, less those that are hostile for sure. k hostile rows near to k honest
    /// ones may remove those; they may not leave the rule with the k and too few others.
    #[must_use]
    pub fn in_force(self, name: RuleName, byzantine: usize, options: &Options, rows: usize) -> (Self, usize) {
        let before = withstood(name, byzantine, options, rows);
        let left = rows.saturating_sub(self.removed.len());
        let after = withstood(name, self.left_of(byzantine), options, left);
        if after < self.left_of(before) {
            return (Self::default(), before);
        }
        (self, after)
    }
}

/// Finds copies; see the module's page. `noise` is the standard deviation of the agreed noise on each value. Nothing is screened without noise, with 25
/// values or fewer, or above [`ROWS_MAX`] rows. One pass for the inner products and one over what they cannot tell; n² numbers of memory.
pub fn copies(rows: &dyn Rows<f32>, noise: f64) -> Copies {
    let (count, dimension) = (rows.count(), rows.dimension());
    let near = std::f64::consts::SQRT_2 * noise * ((dimension as f64).sqrt() - 5.0);
    if near <= 0.0 || !(2..=ROWS_MAX).contains(&count) {
        return Copies::default();
    }
    cover(count, &near_pairs(rows, near * near))
}

/// Pairs `(i, j)`, i > j, whose squared distance is below `limit`. Inner products in `f32` blocks tell nearly all apart; the others are measured again.
fn near_pairs(rows: &dyn Rows<f32>, limit: f64) -> Vec<(usize, usize)> {
    let (count, dimension) = (rows.count(), rows.dimension());
    let pairs = (0..count).flat_map(|one| (0..one).map(move |other| (one, other)));
    let unsure: Vec<(usize, usize)> = match distances_squared(rows) {
        // What cancellation can take away is far below a thousandth of the norms.
        Ok(measured) => pairs
            .filter(|(one, other)| {
                let slack = 1e-3 * (measured.norm_squared(*one) + measured.norm_squared(*other));
                measured.distance_squared(*one, *other) - slack < limit
            })
            .collect(),
        Err(_) => pairs.collect(),
    };
    unsure
        .into_par_iter()
        .filter(|(one, other)| {
            let mut square = 0.0;
            let mut buffers = [[0.0_f32; PIECE]; 2];
            for start in (0..dimension).step_by(PIECE) {
                let length = PIECE.min(dimension - start);
                let [a, b] = &mut buffers;
                let (a, b) = (&mut a[..length], &mut b[..length]);
                rows.read(*one, start, a);
                rows.read(*other, start, b);
                let pairs = a.iter().zip(b.iter());
                square += pairs
                    .map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2))
                    .sum::<f64>();
                if square >= limit {
                    return false;
                }
            }
            true
        })
        .collect()
}

/// A vertex cover of the pairs; see the module's page.
fn cover(count: usize, pairs: &[(usize, usize)]) -> Copies {
    let Cover { removed, hostile } = robust::cover(count, pairs);
    Copies { removed, hostile }
}

/// The largest number of hostile rows, at most `byzantine`, for which `rows` are enough for the rule; 0 where there is none. What is too much to compute is not too few
/// rows: nothing is lowered for it, and [`Rule::check`](crate::robust::Rule::check) of the rule that comes of it refuses.
pub fn withstood(name: RuleName, byzantine: usize, options: &Options, rows: usize) -> usize {
    let takes = |f: &usize| {
        let checked = rule(name, *f, options).and_then(|rule| rule.check(rows));
        matches!(
            checked,
            Ok(()) | Err(RuleError::TooManySubsets { .. } | RuleError::TooManyPairs { .. })
        )
    };
    (0..=byzantine).rev().find(takes).unwrap_or(0)
}

/// The fewest rows, at most `rows`, among which the rule withstands `byzantine`; `rows` where even they are too few.
pub fn rows_needed(name: RuleName, byzantine: usize, options: &Options, rows: usize) -> usize {
    let takes = |n: &usize| rule(name, byzantine, options).is_ok_and(|rule| rule.check(*n).is_ok());
    (2 * byzantine + 1..rows).find(takes).unwrap_or(rows)
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::robust::MatrixRows;

    fn normal(rng: &mut StdRng) -> f32 {
        let (u, v): (f32, f32) = (rng.random_range(f32::EPSILON..1.0), rng.random());
        (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
    }

    fn rows(count: usize, dimension: usize, rng: &mut StdRng) -> Vec<Vec<f32>> {
        (0..count)
            .map(|_| (0..dimension).map(|_| 3.0 * normal(rng)).collect())
            .collect()
    }

    fn matrix(rows: &[Vec<f32>]) -> MatrixRows<f32> {
        MatrixRows::from_rows(rows).unwrap()
    }

    #[test]
    fn honest_rows_are_never_copies_even_with_the_same_signal() {
        let mut rng = StdRng::seed_from_u64(4);
        for dimension in [26, 100, 836, 5_000] {
            let rows = rows(30, dimension, &mut rng);
            assert_eq!(copies(&matrix(&rows), 3.0), Copies::default(), "{dimension}");
        }
    }

    #[test]
    fn copies_and_lightly_changed_ones_count_once() {
        let mut rng = StdRng::seed_from_u64(5);
        // More values than are read at once.
        let mut all = rows(8, 5_000, &mut rng);
        let copied = all[2].clone();
        all.insert(5, copied.clone());
        all.push(copied.iter().map(|v| v + 0.3 * normal(&mut rng)).collect());
        let found = copies(&matrix(&all), 3.0);
        assert_eq!(
            found.removed,
            [(5, 2), (9, 2)],
            "three alike: the first by name stays"
        );
        assert_eq!(
            found.hostile, 1,
            "of three copies one may be honest, and it may have gone"
        );
        assert_eq!(
            copies(&matrix(&all), 0.0),
            Copies::default(),
            "no law without noise"
        );
        assert_eq!(
            copies(&matrix(&vec![vec![0.0; 25]; 4]), 3.0),
            Copies::default(),
            "too few values"
        );
    }

    /// A row without noise of its own beside a strong common signal is near to every honest row. It goes alone, wherever it stands.
    #[test]
    fn row_that_is_near_to_everybody_removes_nobody_but_itself() {
        let mut rng = StdRng::seed_from_u64(7);
        for dimension in [836, 7_258] {
            let common: Vec<f32> = (0..dimension).map(|_| 3.0 * normal(&mut rng)).collect();
            let honest: Vec<Vec<f32>> = (0..9)
                .map(|_| {
                    common
                        .iter()
                        .map(|value| value + 3.0 * normal(&mut rng))
                        .collect()
                })
                .collect();
            for place in [0, 4, 9] {
                let mut all = honest.clone();
                all.insert(place, common.clone());
                let found = copies(&matrix(&all), 3.0);
                let removed: Vec<usize> = found.removed.iter().map(|(row, _)| *row).collect();
                assert_eq!(removed, [place], "{dimension}");
                assert_eq!(found.left_of(3), 3, "it may be the only one that is known");
            }
        }
    }

    /// Hostile rows that come first by name and are near to one honest row each remove as many as they are, and f does not shrink for it.
    #[test]
    fn mimics_remove_no_more_than_they_are_and_leave_f_alone() {
        let mut rng = StdRng::seed_from_u64(8);
        let honest = rows(7, 400, &mut rng);
        let mimics = (0..3).map(|row| {
            honest[row]
                .iter()
                .map(|value| value + 0.6 * normal(&mut rng))
                .collect()
        });
        let mut all: Vec<Vec<f32>> = mimics.collect();
        all.extend(honest);
        let found = copies(&matrix(&all), 3.0);
        let removed: Vec<usize> = found.removed.iter().map(|(row, _)| *row).collect();
        assert_eq!(removed, [3, 4, 5], "one of each pair");
        assert_eq!((found.hostile, found.left_of(3)), (0, 3));
    }

    /// Graphs in which k rows are near to as many honest ones as they like, in any order of the rows: the honest that go are never more than k. The seed is 10.
    #[test]
    fn hostile_rows_never_remove_more_honest_rows_than_they_are() {
        let mut rng = StdRng::seed_from_u64(10);
        let mut harmonic = Vec::new();
        // The graph on which taking the most connected first is worst.
        let (k, mut next) = (9, 9);
        for size in (1..=k).rev() {
            for group in 0..k / size {
                harmonic.extend((0..size).map(|member| (next, group * size + member)));
                next += 1;
            }
        }
        let removed_honest = |hostile: usize, count: usize, pairs: &[(usize, usize)], order: &[usize]| {
            let named = pairs
                .iter()
                .map(|(one, other)| (order[*one].max(order[*other]), order[*one].min(order[*other])));
            let found = cover(count, &named.collect::<Vec<_>>());
            for (one, other) in pairs {
                assert!(found.has(order[*one]) || found.has(order[*other]), "a cover");
            }
            let gone = (0..count).filter(|row| found.has(order[*row]));
            let (bad, good): (Vec<usize>, Vec<usize>) = gone.partition(|row| *row < hostile);
            assert!(found.hostile <= bad.len(), "{found:?}");
            good.len()
        };
        let in_order: Vec<usize> = (0..next).collect();
        let reversed: Vec<usize> = (0..next).rev().collect();
        for order in [&in_order, &reversed] {
            assert!(removed_honest(k, next, &harmonic, order) <= k);
        }
        for _ in 0..300 {
            let (hostile, honest) = (rng.random_range(1..7_usize), rng.random_range(1..15_usize));
            let count = hostile + honest;
            let share: f64 = rng.random();
            let mut pairs = Vec::new();
            for one in 0..hostile {
                pairs.extend(
                    (one + 1..count)
                        .filter(|_| rng.random::<f64>() < share)
                        .map(|other| (other, one)),
                );
            }
            let mut order: Vec<usize> = (0..count).collect();
            for place in (1..count).rev() {
                order.swap(place, rng.random_range(0..=place));
            }
            assert!(
                removed_honest(hostile, count, &pairs, &order) <= hostile,
                "{pairs:?} {order:?}"
            );
        }
    }

    #[test]
    fn f_shrinks_by_copies_that_are_hostile_for_sure_and_never_to_nothing() {
        let mut rng = StdRng::seed_from_u64(9);
        let mut all = rows(6, 200, &mut rng);
        for _ in 0..3 {
            all.push(all[5].clone());
        }
        let found = copies(&matrix(&all), 3.0);
        assert_eq!(found.removed, [(6, 5), (7, 5), (8, 5)]);
        assert_eq!(found.hostile, 2);
        assert_eq!([5, 3, 2, 1, 0].map(|f| found.left_of(f)), [3, 1, 1, 1, 0]);
    }

    /// What cannot be computed is refused by the rule's own check, not computed for fewer hostile rows.
    #[test]
    fn nothing_is_lowered_for_want_of_computing() {
        let (options, mda): (_, RuleName) = (Options::default(), "mda".parse().unwrap());
        let checked = |f: usize, rows: usize| rule(mda, f, &options).and_then(|rule| rule.check(rows));
        assert!(checked(10, 21).is_ok() && checked(6, 40).is_ok());
        assert!(matches!(checked(10, 40), Err(RuleError::TooManySubsets { .. })));
        assert_eq!(
            [21, 40, 20].map(|rows| withstood(mda, 10, &options, rows)),
            [10, 10, 9]
        );
        let none = Copies::default();
        assert_eq!(none.clone().in_force(mda, 10, &options, 40), (none, 10));
    }

    /// One hostile row that is near to an honest one among 2f + 1 = 3: without the screen the rule withstands it, with two rows left it would be half of a mean.
    #[test]
    fn screen_never_leaves_the_rule_weaker_than_it_is_without() {
        let options = Options::default();
        let found = |removed: usize, hostile: usize| Copies {
            removed: (0..removed).map(|row| (row, removed)).collect(),
            hostile,
        };
        let taken = |name: RuleName, f: usize, rows: usize, found: &Copies| {
            let (copies, withstood) = found.clone().in_force(name, f, &options, rows);
            (copies.removed.len(), withstood)
        };
        let bulyan: RuleName = "bulyan".parse().unwrap();
        assert_eq!(taken(RuleName::CAF, 1, 3, &found(1, 0)), (0, 1));
        assert_eq!(taken(RuleName::CAF, 1, 4, &found(1, 0)), (1, 1));
        assert_eq!(taken(RuleName::CAF, 3, 8, &found(2, 0)), (0, 3));
        assert_eq!(taken(RuleName::CAF, 3, 7, &found(3, 1)), (0, 3));
        assert_eq!(taken(RuleName::CAF, 3, 8, &found(3, 2)), (3, 1));
        assert_eq!(taken(bulyan, 1, 7, &found(1, 0)), (0, 1));
        assert_eq!(taken(bulyan, 1, 8, &found(1, 0)), (1, 1));
        // Too few for f already: what they withstand is kept, too.
        assert_eq!(taken(RuleName::CAF, 2, 4, &found(1, 0)), (1, 1));
        assert_eq!(taken(RuleName::CAF, 2, 3, &found(1, 0)), (0, 1));
        // Many names of one site, and a rule that withstands nobody anyway.
        assert_eq!(taken(RuleName::CAF, 3, 15, &found(9, 8)), (9, 1));
        assert_eq!(taken(RuleName::MEAN, 0, 3, &found(1, 0)), (1, 0));
    }

    /// Where a rule needs more rows than a bare majority of honest ones, fewer are withstood rather than none published.
    #[test]
    fn as_many_are_withstood_as_the_rule_takes() {
        let options = Options::default();
        let bulyan: RuleName = "bulyan".parse().unwrap();
        assert_eq!(
            [7, 6, 3].map(|rows| withstood(bulyan, 1, &options, rows)),
            [1, 0, 0]
        );
        assert_eq!(rows_needed(bulyan, 1, &options, 9), 7);
        assert_eq!(rows_needed(RuleName::CAF, 2, &options, 9), 5);
        assert_eq!(withstood(RuleName::CAF, 4, &options, 8), 3);
    }
}
