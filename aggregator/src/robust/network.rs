//! A sorting network over rows: every comparator works on [`LANES`] columns at once and compiles to vector minima and
//! maxima, several times faster than sorting column by column.

use super::rows::Scalar;
use super::tiles::LANES;

/// Largest number of rows; above it, sorting each column is faster.
const ROWS_MAX: usize = 256;

/// Batcher's merge-exchange network (Knuth, The Art of Computer Programming, volume 3, section 5.2.2, algorithm M) for a
/// fixed number of rows. Which comparators run depends on that number alone, never on the values.
#[derive(Debug)]
pub(super) struct SortingNetwork {
    comparators: Vec<(u16, u16)>,
}

impl SortingNetwork {
    /// The network for `rows` rows; `None` where it would not pay.
    pub(super) fn for_rows(rows: usize) -> Option<Self> {
        if rows > ROWS_MAX {
            return None;
        }
        let rows = u16::try_from(rows).ok()?;
        let mut comparators = Vec::new();
        let top = rows.next_power_of_two() / 2;
        let mut p = top;
        while p > 0 {
            let (mut q, mut r, mut gap) = (top, 0, p);
            loop {
                for low in (0..rows.saturating_sub(gap)).filter(|low| low & p == r) {
                    comparators.push((low, low + gap));
                }
                if q == p {
                    break;
                }
                (gap, q, r) = (q - p, q / 2, p);
            }
            p /= 2;
        }
        Some(Self { comparators })
    }

    /// Sorts every column ascending.
    pub(super) fn sort<T: Scalar>(&self, tile: &mut [[T; LANES]]) {
        for &(low, high) in &self.comparators {
            let (low, high) = (usize::from(low), usize::from(high));
            let (head, tail) = tile.split_at_mut(high);
            for (a, b) in head[low].iter_mut().zip(&mut tail[0]) {
                let (x, y) = (*a, *b);
                *a = if y < x { y } else { x };
                *b = if y < x { x } else { y };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A network that sorts every sequence of zeros and ones sorts everything (Knuth, theorem Z); random columns of many
    /// values are the affordable form of it above 16 rows.
    #[test]
    fn sorts_every_number_of_rows() {
        for rows in 1..=16_usize {
            let network = SortingNetwork::for_rows(rows).unwrap();
            for bits in (0..1_u32 << rows).step_by(LANES) {
                let mut tile: Vec<[f32; LANES]> = (0..rows)
                    .map(|row| std::array::from_fn(|lane| ((bits as usize + lane) >> row & 1) as f32))
                    .collect();
                network.sort(&mut tile);
                for lane in 0..LANES {
                    assert!(
                        tile.windows(2).all(|pair| pair[0][lane] <= pair[1][lane]),
                        "{rows} rows, {bits:b}"
                    );
                }
            }
        }
        for rows in 17..=ROWS_MAX {
            let network = SortingNetwork::for_rows(rows).unwrap();
            let value = |row: usize, lane: usize| ((row * 7_919 + lane * 104_729) % 1_009) as f64;
            let mut tile: Vec<[f64; LANES]> = (0..rows)
                .map(|row| std::array::from_fn(|l| value(row, l)))
                .collect();
            network.sort(&mut tile);
            for lane in 0..LANES {
                let mut expected: Vec<f64> = (0..rows).map(|row| value(row, lane)).collect();
                expected.sort_by(f64::total_cmp);
                assert!(tile.iter().map(|lanes| lanes[lane]).eq(expected), "{rows} rows");
            }
        }
        assert!(SortingNetwork::for_rows(ROWS_MAX + 1).is_none());
    }
}
