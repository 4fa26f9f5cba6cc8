//! The screen for near-copies: colluders who send one row many times, each a little changed, count once.

use super::gram::Gram;
use super::method::{Mixed, Round, Stage};
use super::mix::Mix;

/// Below this the median of the nearest-neighbour distances is rounding: half the median of all distances takes its place.
const NOTHING: f64 = 1e-9;

/// One row of each group that is closer than half the median nearest-neighbour distance of all rows, the first of the group;
/// then f′ = max(1, min(f − removed, (kept − 1)/2)), 0 where f was 0.
///
/// Honest updates carry independent noise and data and are not near-copies. Colluders who jitter their copies by as much as
/// honest rows differ pass. Cost n²·d/2 for the distances. Memory n² numbers. Under privacy noise and with sites that differ: good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dedup;

impl Stage for Dedup {
    fn mix(&self, round: Round<'_>) -> Mixed {
        let groups = groups(round.gram);
        let kept = groups.len();
        let f = round
            .f
            .saturating_sub(round.n - kept)
            .max(1)
            .min((kept - 1) / 2)
            .min(round.f);
        let first = groups.iter().map(|group| vec![group[0]]).collect();
        Mixed {
            mix: Mix::means(first, round.n),
            f,
            permutation: None,
        }
    }
}

/// Groups of near-copies in the order of their first row, each ascending; a row without a copy is a group of one. The record
/// names whole groups: which of its rows came first says nothing about who copied whom.
pub(super) fn groups(gram: &Gram) -> Vec<Vec<usize>> {
    let n = gram.count();
    let limit = limit(gram);
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for row in 0..n {
        let near = |group: &&mut Vec<usize>| gram.distance_squared(group[0], row).sqrt() <= limit;
        match groups.iter_mut().find(near) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups
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
    use crate::robust::MatrixRows;

    fn groups_of(rows: &[[f64; 2]]) -> Vec<Vec<usize>> {
        groups(&Gram::of(&MatrixRows::from_rows(rows).unwrap(), &[]).unwrap())
    }

    #[test]
    fn copies_are_one_group_and_the_rest_stay() {
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
        assert_eq!(
            groups_of(&rows),
            [vec![0], vec![1], vec![2, 4, 6], vec![3], vec![5], vec![7]]
        );
        let gram = Gram::of(&MatrixRows::from_rows(&rows).unwrap(), &[]).unwrap();
        let mixed = Dedup.mix(Round {
            n: 8,
            f: 3,
            gram: &gram,
        });
        assert_eq!((mixed.mix.outputs(), mixed.f), (6, 1));
    }

    #[test]
    fn identical_rows_are_one() {
        assert_eq!(groups_of(&[[1.0, 2.0]; 5]), [vec![0, 1, 2, 3, 4]]);
        let gram = Gram::of(&MatrixRows::from_rows(&[[1.0, 2.0]; 5]).unwrap(), &[]).unwrap();
        assert_eq!(
            Dedup
                .mix(Round {
                    n: 5,
                    f: 2,
                    gram: &gram
                })
                .f,
            0
        );
    }

    #[test]
    fn a_majority_of_copies_is_still_found() {
        let mut rows = vec![[1.0, 1.0]; 6];
        rows.extend([[9.0, 0.0], [0.0, 9.0], [-9.0, 0.0]]);
        assert_eq!(groups_of(&rows).len(), 4);
    }
}
