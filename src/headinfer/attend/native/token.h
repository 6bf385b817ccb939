/*
 * A decode step's attention of one layer with nothing of Python in it: the new token is put into its
 * place, and attended with all before it. Where its place is, is read from memory.
 */
#define PARTS_PER_THREAD 8 /* as in splits.py, and so on: the same parts give the same bits */
#define MIN_SPLIT_TOKENS 512

/*
 * query [heads][group][HEAD_DIM] and result alike; new keys and values [heads][HEAD_DIM], and those
 * before them [heads][][HEAD_DIM], with strides from head to head. Rows of a batch are as many heads
 * more. `place` has the first token that is seen, and how many are, the new one included. There is
 * room for `most_splits` parts in `parts`.
 */
struct token {
    const element *query, *new_keys, *new_values;
    element *keys, *values, *result;
    const int64_t *place;
    float *rows, *out, *lse, *parts;
    int64_t new_key_stride, new_value_stride, key_stride, value_stride, heads, group, most_splits;
    float scale;
};

static int64_t splits_of(const struct token *t, int threads, int64_t tokens) {
    int64_t wanted = threads > 1 ? (PARTS_PER_THREAD * threads + t->heads - 1) / t->heads : 1;
    int64_t worth = tokens / MIN_SPLIT_TOKENS;
    if (wanted > worth) wanted = worth;
    if (wanted > t->most_splits) wanted = t->most_splits;
    return wanted > 1 ? wanted : 1;
}

void attend_token_in(const struct token *t, struct team *team) {
    int64_t first = t->place[0], tokens = t->place[1], last = (first + tokens - 1) * HEAD_DIM;
    int64_t elements = t->heads * ROWS_OF(t->group) * HEAD_DIM;
    int threads = threads_of(team);
    for (int64_t head = 0; head < t->heads; head++) {
        memcpy(t->keys + head * t->key_stride + last, t->new_keys + head * t->new_key_stride,
               HEAD_DIM * sizeof(element));
        memcpy(t->values + head * t->value_stride + last, t->new_values + head * t->new_value_stride,
               HEAD_DIM * sizeof(element));
    }
    for (int64_t i = 0; i < elements; i += LANES) put(t->rows + i, load(t->query + i));
    attend_heads_in(team, t->rows, t->keys, t->values, t->key_stride, t->value_stride, first, tokens,
                    t->heads, splits_of(t, threads, tokens), t->scale, t->parts, t->out, t->lse,
                    t->group, threads);
    for (int64_t i = 0; i < elements; i++) t->result[i] = rounded(t->out[i]);
}

void attend_token(const struct token *t) { attend_token_in(t, 0); }
