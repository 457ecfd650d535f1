// Gradients of keys and values for Hopper, heads of up to 128 features: a warp group owns 64 keys and both their sums.
//
// While a tile's exponentials are taken, the product dS^T Q of the tile before it runs.

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_hopper_dkv(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                     const Span* spans, const Tile* tiles, u32 items, u32* counter, Shape shape,
                     const float2* statistics, u32 rows, Target dk_to, Target dv_to) {
    u32 shared = shared_start();
    DkvBarriers at(shared);
    if (threadIdx.x == 0) at.init();
    __syncthreads();
    int group = (int)(threadIdx.x >> 7) - 1;
    if (group < 0) {
        give_registers<LOADER_REGISTERS>();
        if (threadIdx.x < 32) {
            load_for_keys(shared, at, &q_map, &k_map, &v_map, &dout_map, spans, tiles, items, counter, shape, statistics,
                          rows);
        }
    } else {
        take_registers<WORKER_REGISTERS>();
        bool leader = (threadIdx.x & 31) == 0;
        u32 round = 0;
        Place place = {0, 0};
        u32 group_at = group * 64 * Swizzled<KEY_ROWS, STRETCH>::LINE;
        int own_row = group * 64 + (int)((threadIdx.x & 127) >> 5) * 16 + (int)((threadIdx.x & 31) >> 2);
        float scale = exponent_scale(shape);
        for (;; round++) {
            barrier_wait(at.keys_full, round & 1);
            Keys keys = *told<Keys>(shared, DKV_TOLD_AT);
            if (!keys.left) break;
            float dk[HEAD_DIM / 2], dv[HEAD_DIM / 2];
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) dk[i] = dv[i] = 0.0f;
            float s[DKV_BLOCK / 2], d[DKV_BLOCK / 2], slope[DKV_BLOCK / 2];
            u32 p[DKV_BLOCK / 4], ds[DKV_BLOCK / 4];
            int count = keys.blocks * (int)shape.group, block = keys.begin;
            auto begin_scores = [&]() {
                barrier_wait(at.queries_full + 8 * place.stage, place.parity);
                products_begin();
                product_straight<DKV_BLOCK, HEAD_DIM, KEY_ROWS, DKV_BLOCK, STRETCH>(
                    s, shared + DKV_KEYS_AT + group_at, shared + DKV_QUERIES_AT + place.stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto begin_slopes = [&]() {
                barrier_wait(at.slopes_full + 8 * place.stage, place.parity);
                product_straight<DKV_BLOCK, HEAD_DIM, KEY_ROWS, DKV_BLOCK, STRETCH>(
                    d, shared + DKV_VALUES_AT + group_at, shared + DKV_SLOPES_AT + place.stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto add_keys = [&](u32 stage) {
                product_registers<HEAD_DIM, DKV_BLOCK, DKV_BLOCK, STRETCH>(
                    dk, ds, shared + DKV_QUERIES_AT + stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto add_values = [&]() {
                pack_all(s, p);
                pin(p);
                pin(dv);
                products_begin();
                product_registers<HEAD_DIM, DKV_BLOCK, DKV_BLOCK, STRETCH>(
                    dv, p, shared + DKV_SLOPES_AT + place.stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto pairs = [&]() { return shared + DKV_STATISTICS_AT + place.stage * DKV_BLOCK * 8 + 16 * (threadIdx.x & 3); };
            auto probabilities = [&]() {
                turned_probabilities(s, slope, shape, keys, block, group * 64, own_row, pairs(), scale);
                if (++block == keys.begin + keys.blocks) block = keys.begin;
            };
            if (count > 0) {
                begin_scores();
                begin_slopes();
                products_wait<1>();
                probabilities();
                add_values();
                products_wait<1>();
                turned_slopes(s, slope, d, pairs());
                products_wait<0>();
                pin(dv);
                pin(p);
                pack_all(d, ds);
                for (int i = 1; i < count; i++) {
                    u32 before = place.stage;
                    place.next();
                    pin(ds);
                    pin(dk);
                    begin_scores();
                    add_keys(before);
                    begin_slopes();
                    products_wait<2>();
                    probabilities();
                    products_wait<1>();
                    pin(dk);
                    pin(ds);
                    if (leader) barrier_arrive(at.empty + 8 * before);
                    add_values();
                    products_wait<1>();
                    turned_slopes(s, slope, d, pairs());
                    products_wait<0>();
                    pin(dv);
                    pin(p);
                    pack_all(d, ds);
                }
                pin(ds);
                pin(dk);
                products_begin();
                add_keys(place.stage);
                products_wait<0>();
                pin(dk);
                if (leader) barrier_arrive(at.empty + 8 * place.stage);
                place.next();
            }
            if (leader) barrier_arrive(at.keys_empty);
            u64 row = (u64)keys.row + group * 64;
            int valid = keys.valid - group * 64;
            u32 column = keys.head * HEAD_DIM;
            store_rows(dk, dk_to.data + row * dk_to.stride + column, dk_to.stride, valid, shape.scale, shape.scale);
            store_rows(dv, dv_to.data + row * dv_to.stride + column, dv_to.stride, valid, 1.0f, 1.0f);
        }
    }
}
