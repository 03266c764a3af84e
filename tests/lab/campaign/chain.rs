//! A stock Linux that prints the [hash chain](chain).

use super::Guest;
use crate::lab::{chain, guest};

/// MiB of state under the chain, and milliseconds between links: its window passes over all of it in 32 links.
const CHAIN: (usize, u32) = (8, 20);
/// Links that each life must add, to have looked at all that went through the cut.
const LINKS: usize = 40;

/// Its steps are links, each of which follows from all of its memory.
pub struct Chain {
    chain: chain::Chain,
    /// By number, from 1 on.
    hashes: Vec<String>,
}

impl Chain {
    /// At its first link.
    pub fn new() -> Self {
        Self { chain: chain::Chain::new(CHAIN.0), hashes: Vec::new() }
    }

    pub(super) fn hash(&mut self, step: u64) -> &str {
        while (self.hashes.len() as u64) < step {
            self.hashes.push(self.chain.advance().1);
        }
        &self.hashes[step as usize - 1]
    }
}

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest for Chain {
    fn name(&self) -> &'static str {
        "web"
    }

    fn words(&self) -> String {
        format!(
            "--kernel {} --initrd {} --cmdline 'console=ttyS0 quiet perdure.chain={},{}' --memory 192M",
            guest::KERNEL,
            guest::INITRD,
            CHAIN.0,
            CHAIN.1
        )
    }

    fn has_shown_enough(&self, life: &str) -> bool {
        links(life).count() > LINKS
    }

    fn steps(&mut self, life: &str) -> Result<Vec<u64>, String> {
        let right = |(step, hash)| {
            let follows = self.hash(step);
            if hash == follows { Ok(step) } else { Err(format!("link {step} is {hash}; {follows} follows")) }
        };
        links(life).map(right).collect()
    }
}

/// The end of a line that the life before began is none.
fn links(life: &str) -> impl Iterator<Item = (u64, &str)> {
    let links = life.lines().filter_map(chain::parse);
    links.filter_map(|(step, hash, _)| (step > 0).then_some((step, hash)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_right_or_it_is_none() {
        let mut chain = Chain::new();
        let (first, second) = (chain.hash(1).to_owned(), chain.hash(2).to_owned());
        assert_eq!(chain.steps(&format!("34 8\r\nchain 2 {second} 9\r\n")), Ok(vec![2]));
        assert!(chain.steps(&format!("chain 1 {first} 9\r\nchain 2 {first} 9\r\n")).is_err());
    }
}
