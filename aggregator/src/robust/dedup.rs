//! The screen for near-copies: colluders who send one row many times, each a little changed, count once.

use super::cover::cover;
use super::gram::Gram;
use super::method::{Mixed, Round, Stage};
use super::mix::Mix;

/// Below this the median of the nearest-neighbour distances is rounding: half the median of all distances takes its place.
const NOTHING: f64 = 1e-9;

/// Two rows are near when they are closer than half the median nearest-neighbour distance of all rows. Of the graph of near pairs a [`cover`] goes; f shrinks by
/// those of it that are hostile for sure, never below 1 where it was more. Where what is left would not do for the rule and that f, nothing goes.
///
/// Own design. Honest updates carry independent noise and data and are not near-copies; where honest ones are, one of each pair is lost and f may shrink by it, so a
/// bound for f hostile rows holds only where honest rows are farther apart than that. k hostile rows remove no more than k honest ones. Colluders who jitter their
/// copies by as much as honest rows differ pass. Withstands what the rule behind it withstands, with f rows fewer. Cost n²·d/2 for the distances. Memory n²
/// numbers. Under privacy noise: good, but the screen for copies knows the noise's law and is exact. With sites that differ: good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dedup;

impl Stage for Dedup {
    fn removes(&self) -> bool {
        true
    }

    fn mix(&self, round: Round<'_>) -> Mixed {
        let cover = cover(round.n, &near_pairs(round.gram));
        let goes = |row: &usize| cover.removed.binary_search_by_key(row, |(gone, _)| *gone).is_ok();
        let kept = (0..round.n)
            .filter(|row| !goes(row))
            .map(|row| vec![row])
            .collect();
        Mixed {
            mix: Mix::means(kept, round.n),
            f: round.f.saturating_sub(cover.hostile).max(round.f.min(1)),
            permutation: None,
        }
    }
}

/// Pairs `(i, j)`, i > j, of near rows.
fn near_pairs(gram: &Gram) -> Vec<(usize, usize)> {
    let limit = limit(gram);
    (0..gram.count())
        .flat_map(|one| (0..one).map(move |other| (one, other)))
        .filter(|(one, other)| gram.distance_squared(*one, *other).sqrt() <= limit)
        .collect()
}

fn limit(gram: &Gram) -> f64 {
    let n = gram.count();
    if n < 2 {
        return 0.0;
    }
    let distance = |i: usize, j: usize| gram.distance_squared(i, j).sqrt();
    let nearest = |i: usize| {
        (0..n)
            .filter(|j| *j != i)
            .map(|j| distance(i, j))
            .fold(f64::INFINITY, f64::min)
    };
    let half = 0.5 * median((0..n).map(nearest).collect());
    if half > NOTHING {
        return half;
    }
    0.5 * median((0..n).flat_map(|i| (0..i).map(move |j| distance(i, j))).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    0.5 * (values[(values.len() - 1) / 2] + values[values.len() / 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::robust::{Composed, MatrixRows, Options};

    fn kept(rows: &[[f64; 2]], f: usize) -> (Vec<usize>, usize) {
        let gram = Gram::of(&MatrixRows::from_rows(rows).unwrap(), &[]).unwrap();
        let n = rows.len();
        let mixed = Dedup.mix(Round { n, f, gram: &gram });
        let cover = cover(n, &near_pairs(&gram));
        let stays = (0..n).filter(|row| cover.removed.iter().all(|(gone, _)| gone != row));
        let stays: Vec<usize> = stays.collect();
        assert_eq!(mixed.mix.outputs(), stays.len());
        (stays, mixed.f)
    }

    #[test]
    fn of_copies_one_stays_and_the_rest_stay() {
        let rows = [
            [0.0, 0.0],
            [3.0, 0.0],
            [5.0, 5.0],
            [0.0, 4.0],
            [5.01, 5.0],
            [-3.0, 1.0],
            [5.0, 5.02],
            [1.0, -4.0],
        ];
        // Of three copies one may be honest, and it may have gone: one of the two that go is hostile for sure.
        assert_eq!(kept(&rows, 3), (vec![0, 1, 2, 3, 5, 7], 2));
    }

    #[test]
    fn a_row_between_two_honest_ones_goes_alone_and_f_stays() {
        let mut rows = vec![
            [3.5, 0.0],
            [0.0, 0.0],
            [7.0, 0.0],
            [0.0, 12.0],
            [7.0, -12.0],
            [-12.0, 0.0],
            [19.0, 0.0],
            [19.0, 14.0],
        ];
        for place in 0..rows.len() {
            assert_eq!(kept(&rows, 3), ((0..8).filter(|row| *row != place).collect(), 3));
            rows.swap(place, (place + 1) % 8);
        }
    }

    #[test]
    fn a_majority_of_copies_is_still_found() {
        let mut rows = vec![[1.0, 1.0]; 6];
        rows.extend([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0]]);
        assert_eq!(kept(&rows, 4).0.len(), 4);
    }

    #[test]
    fn what_the_rule_could_not_take_is_left_alone() {
        let one = |rows: &[[f64; 2]], f: usize, name: &str| {
            let rule = Composed::new(name.parse().unwrap(), f, &Options::default()).unwrap();
            rule.values(&MatrixRows::from_rows(rows).unwrap()).unwrap().values
        };
        assert_eq!(one(&[[1.0, 2.0]; 5], 2, "dedup+median"), [1.0, 2.0]);
        // Eleven rows for bulyan with f = 2; without one of a near pair there are too few.
        let mut rows: Vec<[f64; 2]> = (0..10)
            .map(|at| [f64::from(at * at), f64::from(7 * at % 10)])
            .collect();
        rows.push([rows[9][0] + 1e-3, rows[9][1]]);
        assert_eq!(one(&rows, 2, "dedup+bulyan"), one(&rows, 2, "bulyan"));
    }
}
