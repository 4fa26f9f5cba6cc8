//! The Merkle tree of RFC 6962 (section 2.1): append-only, SHA-256, with proofs that something is in it and that it only grew.
//!
//! `MTH({}) = SHA-256()`, a leaf is `SHA-256(0x00 ‖ data)`, a node `SHA-256(0x01 ‖ left ‖ right)`, and the left half is the largest power of
//! two that is smaller than the number of leaves.

use sha2::{Digest as _, Sha256};
use theriac_protocol::units::Digest;

/// Hash of a leaf's bytes.
pub fn leaf_hash(leaf: &[u8]) -> Digest {
    Digest(
        Sha256::new()
            .chain_update([0x00])
            .chain_update(leaf)
            .finalize()
            .into(),
    )
}

/// An append-only tree. Holds two hashes for each leaf: 64 bytes.
///
/// Appending costs amortised one hash; a root or proof costs at most (log₂ n)² hashes.
#[derive(Debug, Clone, Default)]
pub struct MerkleTree {
    /// `levels[k][i]` is the root of the complete subtree over leaves `i·2ᵏ .. (i+1)·2ᵏ`.
    levels: Vec<Vec<Digest>>,
}

impl MerkleTree {
    /// The empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// The tree over these leaf hashes.
    pub fn from_leaves(leaves: impl IntoIterator<Item = Digest>) -> Self {
        let mut tree = Self::new();
        for leaf in leaves {
            tree.append(leaf);
        }
        tree
    }

    /// Appends a leaf's hash and gives its index.
    pub fn append(&mut self, leaf: Digest) -> u64 {
        let index = self.size();
        let mut hash = leaf;
        for level in 0.. {
            if self.levels.len() == level {
                self.levels.push(Vec::new());
            }
            let nodes = &mut self.levels[level];
            nodes.push(hash);
            match nodes.as_slice() {
                [.., left, right] if nodes.len().is_multiple_of(2) => hash = node_hash(*left, *right),
                _ => break,
            }
        }
        index
    }

    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.levels.first().map_or(0, |leaves| leaves.len() as u64)
    }

    /// The root.
    pub fn root(&self) -> Digest {
        self.subtree(0, self.size())
    }

    /// The root when the tree had `size` leaves; `None` when it never had.
    pub fn root_at(&self, size: u64) -> Option<Digest> {
        (size <= self.size()).then(|| self.subtree(0, size))
    }

    /// Proof that leaf `index` is in the tree of `size` leaves; `None` when it is not.
    pub fn inclusion(&self, index: u64, size: u64) -> Option<Vec<Digest>> {
        if index >= size || size > self.size() {
            return None;
        }
        // PATH(m, D[n]): from the root down, the half that the leaf is not in.
        let mut proof = Vec::new();
        let (mut start, mut end) = (0, size);
        while end - start > 1 {
            let middle = start + split(end - start);
            if index < middle {
                proof.push(self.subtree(middle, end));
                end = middle;
            } else {
                proof.push(self.subtree(start, middle));
                start = middle;
            }
        }
        proof.reverse();
        Some(proof)
    }

    /// Proof that the tree of `new` leaves begins with the tree of `old` leaves; `None` unless `old ≤ new ≤` [`MerkleTree::size`].
    /// Empty when `old` is 0 or `new`.
    pub fn consistency(&self, old: u64, new: u64) -> Option<Vec<Digest>> {
        if old > new || new > self.size() {
            return None;
        }
        if old == 0 {
            return Some(Vec::new());
        }
        // SUBPROOF(m, D[n], b): as above, towards the old tree's right edge.
        let mut proof = Vec::new();
        let (mut start, mut end) = (0, new);
        while old < end {
            let middle = start + split(end - start);
            if old <= middle {
                proof.push(self.subtree(middle, end));
                end = middle;
            } else {
                proof.push(self.subtree(start, middle));
                start = middle;
            }
        }
        if start > 0 {
            proof.push(self.subtree(start, end));
        }
        proof.reverse();
        Some(proof)
    }

    /// `MTH` over leaves `start..end`; `start` is a multiple of the largest power of two below the length.
    fn subtree(&self, start: u64, end: u64) -> Digest {
        match end - start {
            0 => Digest(Sha256::digest([]).into()),
            length if length.is_power_of_two() => {
                let level = length.trailing_zeros();
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "an index into a vector that is in memory"
                )]
                let index = (start >> level) as usize;
                self.levels[level as usize][index]
            }
            length => {
                let middle = start + split(length);
                node_hash(self.subtree(start, middle), self.subtree(middle, end))
            }
        }
    }
}

/// Whether `proof` shows that `leaf` has `index` in the tree with `size` leaves and this `root`
/// (RFC 9162, section 2.1.3.2).
#[must_use]
pub fn verify_inclusion(leaf: Digest, index: u64, size: u64, root: Digest, proof: &[Digest]) -> bool {
    if index >= size {
        return false;
    }
    let (mut position, mut last, mut hash) = (index, size - 1, leaf);
    for sibling in proof {
        if last == 0 {
            return false;
        }
        if !position.is_multiple_of(2) || position == last {
            hash = node_hash(*sibling, hash);
            while position.is_multiple_of(2) && position != 0 {
                position >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(hash, *sibling);
        }
        position >>= 1;
        last >>= 1;
    }
    last == 0 && hash == root
}

/// Whether `proof` shows that the tree with `new` leaves and `new_root` begins with the one with `old` leaves and `old_root`
/// (RFC 9162, section 2.1.4.2). The empty tree is the beginning of every tree.
#[must_use]
pub fn verify_consistency(old: u64, old_root: Digest, new: u64, new_root: Digest, proof: &[Digest]) -> bool {
    if old > new {
        return false;
    }
    if old == new {
        return proof.is_empty() && old_root == new_root;
    }
    if old == 0 {
        return proof.is_empty() && old_root == MerkleTree::new().root();
    }
    let (mut position, mut last) = (old - 1, new - 1);
    while !position.is_multiple_of(2) {
        position >>= 1;
        last >>= 1;
    }
    // A complete old tree is itself the first node of the path and is left out of the proof.
    let (first, rest) = match proof.split_first() {
        _ if old.is_power_of_two() => (old_root, proof),
        Some((first, rest)) => (*first, rest),
        None => return false,
    };
    let (mut old_hash, mut new_hash) = (first, first);
    for sibling in rest {
        if last == 0 {
            return false;
        }
        if !position.is_multiple_of(2) || position == last {
            old_hash = node_hash(*sibling, old_hash);
            new_hash = node_hash(*sibling, new_hash);
            while position.is_multiple_of(2) && position != 0 {
                position >>= 1;
                last >>= 1;
            }
        } else {
            new_hash = node_hash(new_hash, *sibling);
        }
        position >>= 1;
        last >>= 1;
    }
    last == 0 && old_hash == old_root && new_hash == new_root
}

/// Largest power of two smaller than `length`, which is at least 2.
fn split(length: u64) -> u64 {
    1 << (u64::BITS - 1 - (length - 1).leading_zeros())
}

fn node_hash(left: Digest, right: Digest) -> Digest {
    Digest(
        Sha256::new()
            .chain_update([0x01])
            .chain_update(left.0)
            .chain_update(right.0)
            .finalize()
            .into(),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hex(text: &str) -> Digest {
        text.parse().unwrap()
    }

    fn leaves(count: u64) -> Vec<Digest> {
        (0..count).map(|n| leaf_hash(&n.to_le_bytes())).collect()
    }

    /// MTH as the RFC writes it, with no cache.
    fn reference_root(leaves: &[Digest]) -> Digest {
        match leaves {
            [] => Digest(Sha256::digest([]).into()),
            [leaf] => *leaf,
            _ => {
                let (left, right) = leaves.split_at(leaves.len().next_power_of_two() / 2);
                node_hash(reference_root(left), reference_root(right))
            }
        }
    }

    /// The eight leaves of the reference implementation of Certificate Transparency, with its roots and proofs
    /// (certificate-transparency, `merkle_tree_test.cc`).
    #[test]
    fn agrees_with_the_published_vectors() {
        let data: [&[u8]; 8] = [
            b"",
            b"\x00",
            b"\x10",
            b"\x20\x21",
            b"\x30\x31",
            b"\x40\x41\x42\x43",
            b"\x50\x51\x52\x53\x54\x55\x56\x57",
            b"\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x6a\x6b\x6c\x6d\x6e\x6f",
        ];
        let roots = [
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ];
        let mut tree = MerkleTree::new();
        assert_eq!(tree.root(), hex(roots[0]));
        for (data, root) in data.iter().zip(&roots[1..]) {
            tree.append(leaf_hash(data));
            assert_eq!(tree.root(), hex(root), "{} leaves", tree.size());
        }
        let inclusion = [
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ];
        assert_eq!(tree.inclusion(5, 8).unwrap(), inclusion.map(hex));
        let consistency = [
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ];
        assert_eq!(tree.consistency(6, 8).unwrap(), consistency.map(hex));
    }

    #[test]
    fn root_after_every_append_is_that_of_the_rfc() {
        let all = leaves(300);
        let mut tree = MerkleTree::new();
        for size in 0..=all.len() {
            assert_eq!(tree.root(), reference_root(&all[..size]), "{size} leaves");
            if let Some(leaf) = all.get(size) {
                assert_eq!(tree.append(*leaf), size as u64);
            }
        }
        for size in 0..=all.len() {
            assert_eq!(tree.root_at(size as u64), Some(reference_root(&all[..size])));
        }
        assert_eq!(tree.root_at(301), None);
    }

    /// Every leaf of every tree size up to 100. Every proof holds, and none holds for another index or tree size.
    #[test]
    fn every_inclusion_proof_holds_and_only_for_its_index_and_size() {
        const SIZES: u64 = 100;
        let all = leaves(SIZES);
        let tree = MerkleTree::from_leaves(all.iter().copied());
        for size in 1..=SIZES {
            let root = tree.root_at(size).unwrap();
            for index in 0..size {
                let leaf = all[usize::try_from(index).unwrap()];
                let proof = tree.inclusion(index, size).unwrap();
                assert!(
                    verify_inclusion(leaf, index, size, root, &proof),
                    "{index} of {size}"
                );
                for wrong in [index.wrapping_sub(1), index + 1, index ^ 1, 0, size] {
                    let other = wrong != index && verify_inclusion(leaf, wrong, size, root, &proof);
                    assert!(!other, "{index} of {size} passes as {wrong}");
                }
            }
            assert_eq!(tree.inclusion(size, size), None);
        }
    }

    /// Every pair of sizes up to 100.
    #[test]
    fn every_consistency_proof_holds() {
        const SIZES: u64 = 100;
        let tree = MerkleTree::from_leaves(leaves(SIZES));
        let roots: Vec<Digest> = (0..=SIZES).map(|size| tree.root_at(size).unwrap()).collect();
        let root = |size: u64| roots[usize::try_from(size).unwrap()];
        for new in 0..=SIZES {
            for old in 0..=new {
                let proof = tree.consistency(old, new).unwrap();
                assert!(proof.len() <= 64, "the welcome message holds at most 64 hashes");
                assert!(
                    verify_consistency(old, root(old), new, root(new), &proof),
                    "{old} to {new}"
                );
            }
            assert_eq!(tree.consistency(new + 1, new), None);
        }
        assert_eq!(tree.consistency(1, SIZES + 1), None);
    }

    /// On which side each sibling stands, from the leaf up: all that a proof's verifier learns from the tree size.
    fn turns(index: u64, size: u64) -> Vec<bool> {
        if size == 1 {
            return Vec::new();
        }
        let left = size.next_power_of_two() / 2;
        let goes_left = index < left;
        let mut turns = if goes_left {
            turns(index, left)
        } else {
            turns(index - left, size - left)
        };
        turns.push(goes_left);
        turns
    }

    /// A published library once took a proof with a wrong tree size. Here one passes only where both sizes put the very
    /// same siblings on the same sides, which no verifier can tell apart from the hashes; the signed head binds size
    /// and root.
    #[test]
    fn no_inclusion_proof_holds_for_a_tree_size_of_another_shape() {
        const SIZES: u64 = 40;
        let all = leaves(SIZES);
        let tree = MerkleTree::from_leaves(all.iter().copied());
        for size in 1..=SIZES {
            for index in 0..size {
                let proof = tree.inclusion(index, size).unwrap();
                let leaf = all[usize::try_from(index).unwrap()];
                for wrong in (0..=2 * SIZES).filter(|wrong| *wrong != size) {
                    let passes = verify_inclusion(leaf, index, wrong, tree.root_at(size).unwrap(), &proof);
                    let same_shape = wrong > index && turns(index, wrong) == turns(index, size);
                    assert_eq!(passes, same_shape, "leaf {index} of {size}, taken for {wrong}");
                    if let Some(root) = tree.root_at(wrong) {
                        assert!(
                            !verify_inclusion(leaf, index, wrong, root, &proof),
                            "{index} of {size} as {wrong}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn no_consistency_proof_holds_for_another_old_size_or_for_another_tree() {
        const SIZES: u64 = 40;
        let tree = MerkleTree::from_leaves(leaves(SIZES));
        let root = |size| tree.root_at(size).unwrap();
        for new in 1..=SIZES {
            for old in 1..new {
                let proof = tree.consistency(old, new).unwrap();
                for wrong in (0..=SIZES).filter(|wrong| *wrong != old) {
                    assert!(
                        !verify_consistency(wrong, root(old), new, root(new), &proof),
                        "from {wrong}, not {old}"
                    );
                }
                for wrong in (0..=SIZES).filter(|wrong| *wrong != new) {
                    assert!(
                        !verify_consistency(old, root(old), wrong, root(wrong), &proof),
                        "to {wrong}, not {new}"
                    );
                }
            }
        }
    }

    proptest! {
        #[test]
        fn no_changed_proof_holds(size in 2_u64..200, at in any::<prop::sample::Index>(), bit in 0_usize..256, which in any::<prop::sample::Index>()) {
            let all = leaves(size);
            let tree = MerkleTree::from_leaves(all.iter().copied());
            let root = tree.root();
            let index = at.index(all.len());
            let proof = tree.inclusion(index as u64, size).unwrap();
            let old = (at.index(all.len() - 1) + 1) as u64;
            let old_root = tree.root_at(old).unwrap();
            let grown = tree.consistency(old, size).unwrap();
            let inclusion = |proof: &[Digest]| verify_inclusion(all[index], index as u64, size, root, proof);
            let consistency = |proof: &[Digest]| verify_consistency(old, old_root, size, root, proof);
            for (proof, holds) in [(&proof, &inclusion as &dyn Fn(&[Digest]) -> bool), (&grown, &consistency)] {
                prop_assert!(holds(proof));
                let longer: Vec<Digest> = proof.iter().copied().chain([leaf_hash(b"")]).collect();
                prop_assert!(!holds(&longer));
                if proof.is_empty() {
                    continue;
                }
                let which = which.index(proof.len());
                let mut changed = proof.clone();
                changed[which].0[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(!holds(&changed));
                let mut shorter = proof.clone();
                shorter.remove(which);
                prop_assert!(!holds(&shorter));
                let mut turned = proof.clone();
                turned.rotate_left(1);
                prop_assert!(turned == *proof || !holds(&turned));
            }
            let mut other = root;
            other.0[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!verify_inclusion(all[index], index as u64, size, other, &proof));
            prop_assert!(!verify_consistency(old, old_root, size, other, &grown));
            prop_assert!(!verify_consistency(old, other, size, root, &grown));
        }
    }
}
