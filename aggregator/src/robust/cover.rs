//! Which rows go when some are too near to others to be independent.
//!
//! Nearness is no equivalence: one row may be near to many that are far from one another. Honest rows are near to no honest row, so the hostile ones are a
//! vertex cover of the graph of near pairs. What goes is a cover that is half-integral first (Nemhauser and Trotter 1975, "Vertex packings"): rows that the
//! linear program puts at 1 go, at 0 stay, and of those at ½ the most connected go, one after another (among equals the last by index), until no two are near. So a
//! row that is near to everybody goes alone, of a group of copies one stays, and **k hostile rows never remove more than k honest ones**: the rows at 1 are no more
//! than the hostile ones among those at 1 and 0 (persistency), and of those at ½ at least half are hostile.
//!
//! How many of the removed are hostile for sure, and no longer count in f: honest ones among them are near to no other honest one, so there are no more of them
//! than groups of mutually near rows cover the removed ([`Cover::hostile`]).

/// What a cover takes out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Cover {
    /// Rows that go, ascending, and a row that each is near to.
    pub(crate) removed: Vec<(usize, usize)>,
    /// At least so many of them are hostile.
    pub(crate) hostile: usize,
}

/// Which rows go for their nearness; see the module's page. `pairs`: near ones, in any order. Polynomial in `count`; nothing for no pairs.
pub(crate) fn cover(count: usize, pairs: &[(usize, usize)]) -> Cover {
    if pairs.is_empty() {
        return Cover::default();
    }
    let mut near: Vec<Vec<usize>> = vec![Vec::new(); count];
    for (one, other) in pairs {
        near[*one].push(*other);
        near[*other].push(*one);
    }
    let halves = half_integral(&near);
    let mut gone: Vec<bool> = halves.iter().map(|halves| *halves == 2).collect();
    let alive = |row: usize, gone: &[bool]| near[row].iter().filter(|other| !gone[**other]).count();
    let mut order: Vec<usize> = (0..count).filter(|row| gone[*row]).collect();
    // Rows at 0 have none but rows at 1 beside them, so what is left to cover lies among the halves.
    let mut degree: Vec<usize> = (0..count).map(|row| alive(row, &gone)).collect();
    while let Some(row) = (0..count)
        .filter(|row| !gone[*row] && degree[*row] > 0)
        .max_by_key(|row| (degree[*row], *row))
    {
        gone[row] = true;
        order.push(row);
        for other in &near[row] {
            degree[*other] = degree[*other].saturating_sub(1);
        }
    }
    let mut removed: Vec<(usize, usize)> = order
        .into_iter()
        .map(|row| {
            let stays = near[row].iter().copied().filter(|other| !gone[*other]).min();
            (
                row,
                stays.or_else(|| near[row].iter().copied().min()).unwrap_or(row),
            )
        })
        .collect();
    removed.sort_unstable();
    // Groups of mutually near rows that cover the removed: each holds one honest row at most.
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (row, _) in &removed {
        match groups
            .iter_mut()
            .find(|group| group.iter().all(|member| near[*row].contains(member)))
        {
            Some(group) => group.push(*row),
            None => groups.push(vec![*row]),
        }
    }
    let hostile = removed.len() - groups.len();
    Cover { removed, hostile }
}

/// For each vertex twice its value, 0, 1 or 2, in a half-integral optimum of the vertex cover's linear program: a minimum cover of the bipartite double of the
/// graph, from a maximum matching (König).
fn half_integral(near: &[Vec<usize>]) -> Vec<u8> {
    let count = near.len();
    let (mut right_of, mut left_of) = (vec![None; count], vec![None; count]);
    for start in 0..count {
        // An augmenting path by breadth first: `from` holds by which left vertex a right one was reached.
        let mut from: Vec<Option<usize>> = vec![None; count];
        let mut queue = std::collections::VecDeque::from([start]);
        let mut end = None;
        while let Some(left) = queue.pop_front().filter(|_| end.is_none()) {
            for right in near[left].iter().copied() {
                if from[right].is_some() {
                    continue;
                }
                from[right] = Some(left);
                if let Some(next) = left_of[right] {
                    queue.push_back(next);
                } else {
                    end = Some(right);
                    break;
                }
            }
        }
        while let Some(right) = end {
            let Some(left) = from[right] else { break };
            end = right_of[left];
            (right_of[left], left_of[right]) = (Some(right), Some(left));
        }
    }
    let mut seen = [vec![false; count], vec![false; count]];
    let mut queue: Vec<usize> = (0..count).filter(|left| right_of[*left].is_none()).collect();
    for left in &queue {
        seen[0][*left] = true;
    }
    while let Some(left) = queue.pop() {
        for right in near[left].iter().copied() {
            seen[1][right] = true;
            if let Some(next) = left_of[right].filter(|next: &usize| !seen[0][*next]) {
                seen[0][next] = true;
                queue.push(next);
            }
        }
    }
    (0..count)
        .map(|row| u8::from(!seen[0][row]) + u8::from(seen[1][row]))
        .collect()
}
