//! Nearest-neighbour mixing (Allouah et al. 2023, arXiv 2302.01772, algorithm 2).

use super::method::{Mixed, Round, Stage};
use super::mix::Mix;

/// Each row becomes the mean of the n − f rows nearest to it, itself included; the lower index first where they are equally
/// far. With it any rule of constant quality reaches the optimal order f/n.
///
/// Breakdown point that of the rule behind it. Cost n²·d/2 for the distances, at most n·f·d for the mixing. Memory n² numbers:
/// the mixed rows are made stripe by stripe. Under privacy noise: averages the noise of n − f rows. Sites that differ: the best
/// generic cure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nnm;

impl Stage for Nnm {
    fn mix(&self, round: Round<'_>) -> Mixed {
        let keep = round.n - round.f;
        let near = |row: usize| {
            let mut near = round.gram.nearest(row);
            near.truncate(keep);
            near
        };
        Mixed::same_f(Mix::means((0..round.n).map(near).collect(), round.n), round)
    }
}
