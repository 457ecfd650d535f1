#![no_main]

#[global_allocator]
static ALLOCATOR: shanty_fuzz::memory::Counting = shanty_fuzz::memory::Counting;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let target = shanty_fuzz::target("chat_template").expect("the target is registered");
    shanty_fuzz::check(target, bytes);
});
