"""The order of a mix, written anew from its description. Prints the golden rows of `mixed.rs`."""

M = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M
    return z ^ (z >> 31)


def shuffle(items, key):
    state = key

    def below(bound):
        nonlocal state
        while True:
            state = (state + GAMMA) & M
            product = mix(state) * bound
            low = product & M
            if low >= bound or low >= ((1 << 64) % bound):
                return product >> 64

    for last in range(len(items) - 1, 0, -1):
        other = below(last + 1)
        items[last], items[other] = items[other], items[last]
    return items


def epoch_order(seed, epoch, parts):
    total = sum(rows for rows, _ in parts)
    order, first = [], 0
    for source, (rows, quota) in enumerate(parts):
        deck_key = mix(seed ^ mix(((source + 1) * GAMMA) & M))
        start = epoch * quota
        for at in range(start, start + quota):
            # Dealt cards may come from several passes through the deck.
            deck = shuffle(list(range(first, first + rows)), mix(deck_key ^ mix((at // rows + GAMMA) & M)))
            order.append((at // rows - start // rows) * total + deck[at % rows])
        first += rows
    return shuffle(order, mix(seed ^ mix((epoch + GAMMA) & M)))


for seed, epoch in [(17, 0), (17, 1), (M, 9)]:
    print(epoch_order(seed, epoch, [(3, 7), (9, 5)]))
