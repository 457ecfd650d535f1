//! What members owe to sums that travel rounded, in a checkpoint: a file a rank.

use shanty_checkpoint::Snapshot;
use shanty_collective::{Collective, Result};

/// The file of a rank.
fn file(rank: usize) -> String {
    format!("feedback-{rank}.f32")
}

/// What all members owe, as files, at rank 0; nothing at the others, and nowhere where sums travel whole.
pub(super) fn gather(collective: &mut dyn Collective, owed: &[f32]) -> Result<Vec<(String, Vec<u8>)>> {
    if collective.feedback().is_none() {
        return Ok(Vec::new());
    }
    let mut longest = [owed.len() as u64];
    collective.all_reduce_u64(&mut longest)?;
    if longest == [0] {
        return Ok(Vec::new());
    }
    let (rank, world_size) = (collective.rank(), collective.world_size());
    let mut files = Vec::new();
    for root in 0..world_size {
        let mut length = [if root == rank { owed.len() as u64 } else { 0 }];
        collective.all_reduce_u64(&mut length)?;
        let mut numbers = vec![0.0f32; length[0] as usize];
        if root == rank {
            numbers.copy_from_slice(owed);
        }
        collective.broadcast(root, bytemuck::cast_slice_mut(&mut numbers))?;
        if rank == 0 {
            files.push((file(root as usize), bytemuck::cast_slice(&numbers).to_vec()));
        }
    }
    Ok(files)
}

/// What a checkpoint says that its members owed, by rank.
pub(super) fn of(snapshot: &Snapshot) -> Vec<Vec<f32>> {
    let numbers = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    (0..).map_while(|rank| snapshot.file(&file(rank)).map(|bytes| numbers(bytes))).collect()
}

/// Deals out what rank 0 read in a checkpoint; returns what this member owes. With fewer members than there were, one
/// owes for several: the sum of all debts stays.
pub(super) fn deal(collective: &mut dyn Collective, read: &[Vec<f32>], length: usize) -> Result<Vec<f32>> {
    let mut owed = Vec::new();
    if collective.feedback().is_none() {
        return Ok(owed);
    }
    let mut count = [read.len() as u64];
    collective.all_reduce_u64(&mut count)?;
    let (rank, world_size) = (u64::from(collective.rank()), u64::from(collective.world_size()));
    for from in 0..count[0] {
        let mut numbers = vec![0.0f32; length];
        // One of another length is of another layout, and worth nothing.
        if let Some(read) = read.get(from as usize).filter(|read| read.len() == length) {
            numbers.copy_from_slice(read);
        }
        collective.broadcast(0, bytemuck::cast_slice_mut(&mut numbers))?;
        if from % world_size == rank {
            owed.resize(length, 0.0);
            owed.iter_mut().zip(&numbers).for_each(|(owed, number)| *owed += number);
        }
    }
    Ok(owed)
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use shanty_checkpoint::{Key, Optimizer, State};
    use shanty_collective::{
        AbortHandle, Compression,
        tcp::{JoinOptions, Listener, TcpCollective, Token},
    };

    use super::*;

    fn on_all<T: Send>(
        world_size: u32,
        compression: Compression,
        work: impl Fn(&mut TcpCollective) -> T + Sync,
    ) -> Vec<T> {
        let listeners: Vec<_> = (0..world_size).map(|_| Listener::bind("127.0.0.1:0").unwrap()).collect();
        let members: Vec<_> = listeners.iter().map(|listener| listener.local_addr().to_string()).collect();
        let (work, members) = (&work, &members);
        thread::scope(|scope| {
            let members: Vec<_> = (0..)
                .zip(listeners)
                .map(|(rank, listener)| {
                    scope.spawn(move || {
                        let options = JoinOptions {
                            job: "debts".to_owned(),
                            generation: 1,
                            rank,
                            members: members.clone(),
                            token: Token([1; 32]),
                            deadline: Duration::from_secs(20),
                            encrypted: false,
                            compression,
                        };
                        work(&mut listener.join(&options, AbortHandle::new()).unwrap())
                    })
                })
                .collect();
            members.into_iter().map(|member| member.join().unwrap()).collect()
        })
    }

    fn snapshot(files: Vec<(String, Vec<u8>)>) -> Snapshot {
        Snapshot {
            job: "debts".to_owned(),
            key: Key { attempt: 1, step: 5, generation: 1 },
            files: files.into_iter().map(|(name, bytes)| (name, bytes.into())).collect(),
            optimizer: Optimizer::default(),
            state: State::default(),
        }
    }

    #[test]
    fn a_checkpoint_gives_each_rank_what_it_owed_and_a_smaller_crew_all_of_it() {
        let saved = on_all(3, Compression::Int8, |member| {
            let owed = [member.rank() as f32 + 0.5, -1.0];
            gather(member, &owed).unwrap()
        });
        assert_eq!(saved[1..], [vec![], vec![]], "rank 0 writes");
        let read = of(&snapshot(saved[0].clone()));
        assert_eq!(read, [[0.5, -1.0], [1.5, -1.0], [2.5, -1.0]]);
        for (world_size, expected) in [
            (3, vec![vec![0.5, -1.0], vec![1.5, -1.0], vec![2.5, -1.0]]),
            (2, vec![vec![3.0, -2.0], vec![1.5, -1.0]]),
        ] {
            let dealt = on_all(world_size, Compression::Int8, |member| {
                let read = if member.rank() == 0 { read.clone() } else { Vec::new() };
                deal(member, &read, 2).unwrap()
            });
            assert_eq!(dealt, expected);
        }
    }

    #[test]
    fn whole_sums_owe_nothing() {
        let saved = on_all(2, Compression::Off, |member| gather(member, &[1.0]).unwrap());
        assert_eq!(saved, [vec![], vec![]]);
        let dealt = on_all(2, Compression::Off, |member| deal(member, &[vec![1.0]], 1).unwrap());
        assert_eq!(dealt, [Vec::<f32>::new(), Vec::new()]);
    }

    #[test]
    fn before_the_first_step_there_is_no_file() {
        let saved = on_all(2, Compression::Bf16, |member| gather(member, &[]).unwrap());
        assert_eq!(saved, [vec![], vec![]]);
    }
}
