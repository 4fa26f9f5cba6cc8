//! Named tensors as one flat vector: the only form in which parameters cross the network.

use std::collections::BTreeMap;
use std::ops::Range;

use sha2::{Digest as _, Sha256};

/// Shapes of named tensors, laid out one after another **in the order of their names**, so that every process
/// cuts the same flat vector into the same tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamLayout {
    tensors: BTreeMap<String, Vec<usize>>,
}

impl ParamLayout {
    /// A layout of these tensors; their order does not matter.
    pub fn new<N: Into<String>, S: Into<Vec<usize>>>(tensors: impl IntoIterator<Item = (N, S)>) -> Self {
        Self {
            tensors: tensors
                .into_iter()
                .map(|(name, shape)| (name.into(), shape.into()))
                .collect(),
        }
    }

    /// Number of values in all.
    pub fn len(&self) -> usize {
        self.tensors.values().map(|shape| size(shape)).sum()
    }

    /// Whether it holds no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Name, shape and place of every tensor, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[usize], Range<usize>)> {
        self.tensors.iter().scan(0, |start, (name, shape)| {
            let range = *start..*start + size(shape);
            *start = range.end;
            Some((name.as_str(), shape.as_slice(), range))
        })
    }

    /// Place of one tensor within the flat vector.
    pub fn range(&self, name: &str) -> Option<Range<usize>> {
        self.iter()
            .find(|(found, ..)| *found == name)
            .map(|(.., range)| range)
    }

    /// SHA-256 over names and shapes in order. Equal digests mean that flat vectors may be added.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update("theriac-layout-v1\n");
        for (name, shape, _) in self.iter() {
            let shape: Vec<String> = shape.iter().map(ToString::to_string).collect();
            hash.update(format!("{name}\tf32\t{}\n", shape.join("x")));
        }
        hash.finalize().into()
    }
}

fn size(shape: &[usize]) -> usize {
    shape.iter().product()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_insertion_does_not_matter() {
        let one = ParamLayout::new([("b", vec![2, 3]), ("a", vec![4])]);
        let two = ParamLayout::new([("a", vec![4]), ("b", vec![2, 3])]);
        assert_eq!(one.digest(), two.digest());
        assert_eq!(
            (one.len(), one.range("a"), one.range("b"), one.range("c")),
            (10, Some(0..4), Some(4..10), None)
        );
    }

    #[test]
    fn digest_sees_names_and_shapes() {
        let digest = |name: &str, shape: &[usize]| ParamLayout::new([(name, shape)]).digest();
        assert_ne!(digest("a", &[2, 3]), digest("a", &[3, 2]));
        assert_ne!(digest("a", &[2, 3]), digest("b", &[2, 3]));
        assert_ne!(digest("a", &[6]), digest("a", &[2, 3]));
    }
}
