// The trained tiny Flamingo in plain JavaScript: the chapters once more, without a library.
//
// Functions are named as in Python; beside each stands the page that explains it. A matrix is
// {rows, width, data}, row after row. Weights come from flamingo_weights.js, which
// tools/book/export_play.py writes. It is a classic script: modules do not start from file://.
//
//   await flamingoLite.ready                          loads the weights when first asked for
//   await flamingoLite.caption([canvas], "<image>")   what the model writes
//   await flamingoLite.logits([canvas], "<image>a")   a Float32Array for each token
//   flamingoLite.door(element, text, opened)          a button that loads all this, with progress
"use strict";
(function () {
  let config, tokenizer, tensors; // filled by `receive`
  const matrix = (rows, width, data) => ({ rows, width, data: data || new Float32Array(rows * width) });
  const weight = (name) => {
    if (!tensors.has(name)) throw new Error(`no tensor ${name}`);
    return tensors.get(name);
  };

  // ---- Arithmetic: what torch does for the chapters ------------------------------------

  // x @ weight.T + bias. Two rows by four columns at a time, so that numbers are read from memory
  // once for several products; at the edges the last row or column is simply done again.
  function linear(x, name, hasBias = true) {
    const w = weight(`${name}.weight`), y = matrix(x.rows, w.rows);
    times(x, w, y);
    if (hasBias) {
      const bias = weight(`${name}.bias`).data;
      for (let r = 0, i = 0; r < y.rows; r++) for (let c = 0; c < y.width; c++) y.data[i++] += bias[c];
    }
    return y;
  }

  function times(x, w, y) {
    const n = x.width, out = w.rows, a = x.data, b = w.data, c = y.data;
    for (let o = 0; o < out; o += 4) {
      const o1 = Math.min(o + 1, out - 1), o2 = Math.min(o + 2, out - 1), o3 = Math.min(o + 3, out - 1);
      for (let r = 0; r < x.rows; r += 2) {
        const r1 = Math.min(r + 1, x.rows - 1);
        let i = r * n, j = r1 * n, p = o * n, q = o1 * n, s = o2 * n, t = o3 * n;
        let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
        for (let k = 0; k < n; k++) {
          const u = a[i++], v = a[j++], w0 = b[p++], w1 = b[q++], w2 = b[s++], w3 = b[t++];
          a0 += u * w0; a1 += u * w1; a2 += u * w2; a3 += u * w3;
          b0 += v * w0; b1 += v * w1; b2 += v * w2; b3 += v * w3;
        }
        c[r * out + o] = a0; c[r * out + o1] = a1; c[r * out + o2] = a2; c[r * out + o3] = a3;
        c[r1 * out + o] = b0; c[r1 * out + o1] = b1; c[r1 * out + o2] = b2; c[r1 * out + o3] = b3;
      }
    }
  }

  function layerNorm(x, name) {
    const gain = weight(`${name}.weight`).data, bias = weight(`${name}.bias`).data;
    const y = matrix(x.rows, x.width), d = x.width;
    for (let r = 0; r < x.rows; r++) {
      let mean = 0, square = 0;
      for (let i = 0; i < d; i++) mean += x.data[r * d + i] / d;
      for (let i = 0; i < d; i++) square += (x.data[r * d + i] - mean) ** 2 / d;
      const scale = 1 / Math.sqrt(square + config.eps);
      for (let i = 0; i < d; i++) y.data[r * d + i] = (x.data[r * d + i] - mean) * scale * gain[i] + bias[i];
    }
    return y;
  }

  // x times the normal distribution up to x; Abramowitz and Stegun 7.1.26, right to 2e-7.
  function gelu(x) {
    const z = Math.abs(x) * Math.SQRT1_2, t = 1 / (1 + 0.3275911 * z);
    const series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    const tail = 0.5 * series * Math.exp(-z * z);
    return x > 0 ? x * (1 - tail) : x * tail;
  }

  const each = (x, f) => { x.data.forEach((value, i) => { x.data[i] = f(value); }); return x; };
  const add = (x, y, factor = 1) => matrix(x.rows, x.width, x.data.map((value, i) => value + factor * y.data[i]));

  function stack(x, y) { // torch.cat((x, y), dim=0)
    const both = matrix(x.rows + y.rows, x.width);
    both.data.set(x.data);
    both.data.set(y.data, x.data.length);
    return both;
  }

  function columns(x, part, parts) { // x.chunk(parts, dim=-1)[part]
    const width = x.width / parts, y = matrix(x.rows, width);
    for (let r = 0; r < x.rows; r++) {
      y.data.set(x.data.subarray(r * x.width + part * width, r * x.width + (part + 1) * width), r * width);
    }
    return y;
  }

  // scaled_dot_product_attention, head by head. `mayLook(row, key)` is the mask, true = may look;
  // a row that may look at nothing reads zero. `noted`, (heads * rows, keys), gets the weights.
  function attention(q, k, v, heads, mayLook, noted) {
    const d = q.width / heads, read = matrix(q.rows, q.width), weights = new Float64Array(k.rows);
    for (let h = 0; h < heads; h++) {
      for (let r = 0; r < q.rows; r++) {
        const from = r * q.width + h * d;
        let top = -Infinity, sum = 0;
        for (let j = 0; j < k.rows; j++) {
          weights[j] = -Infinity;
          if (mayLook && !mayLook(r, j)) continue;
          let score = 0;
          for (let i = 0, to = j * q.width + h * d; i < d; i++) score += q.data[from + i] * k.data[to + i];
          weights[j] = score / Math.sqrt(d);
          if (weights[j] > top) top = weights[j];
        }
        if (top === -Infinity) continue; // blind
        for (let j = 0; j < k.rows; j++) sum += weights[j] = Math.exp(weights[j] - top);
        for (let j = 0; j < k.rows; j++) {
          const share = weights[j] / sum;
          if (share === 0) continue;
          if (noted) noted.data[(h * q.rows + r) * k.rows + j] = share;
          for (let i = 0, to = j * q.width + h * d; i < d; i++) read.data[from + i] += share * v.data[to + i];
        }
      }
    }
    return read;
  }

  // ---- Pictures in: 01_clip_features.html ----------------------------------------------

  function imageData(image) { // a canvas, an <img> or ImageData to ImageData
    if (image instanceof ImageData) return image;
    let width = image.naturalWidth || image.width, height = image.naturalHeight || image.height;
    if (!width || !height) throw new Error("the picture is empty, or not loaded yet");
    const less = Math.min(1, 4096 / Math.max(width, height)); // larger canvases fail on phones
    const canvas = document.createElement("canvas");
    canvas.width = width = Math.max(1, Math.round(width * less));
    canvas.height = height = Math.max(1, Math.round(height * less));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0, width, height);
    return context.getImageData(0, 0, width, height);
  }

  function rgb_on_white(image) { // RGBA to {width, height, data: RGB}
    const { width, height, data } = imageData(image), rgb = new Uint8Array(width * height * 3);
    for (let p = 0; p < width * height; p++) {
      const alpha = data[4 * p + 3];
      for (let c = 0; c < 3; c++) rgb[3 * p + c] = Math.round((data[4 * p + c] * alpha + 255 * (255 - alpha)) / 255);
    }
    return { width, height, data: rgb };
  }

  function turn(data, height, width) { // rows become columns
    const turned = new Uint8Array(data.length);
    for (let p = 0; p < height * width; p++) {
      const to = ((p % width) * height + Math.floor(p / width)) * 3;
      for (let c = 0; c < 3; c++) turned[to + c] = data[3 * p + c];
    }
    return turned;
  }

  // One axis of Pillow's bilinear resize with antialias, in its own whole numbers: `lines` lines of
  // `from` pixels become lines of `to`, which are written across, so that twice is both axes.
  function resample(data, lines, from, to) {
    if (from === to) return turn(data, lines, from); // Pillow copies
    const out = new Uint8Array(lines * to * 3), scale = from / to, support = Math.max(scale, 1), narrow = 1 / support;
    for (let o = 0; o < to; o++) {
      const centre = (o + 0.5) * scale, first = Math.max(0, Math.trunc(centre - support + 0.5));
      const n = Math.min(from, Math.trunc(centre + support + 0.5)) - first;
      let shares = Array.from({ length: n }, (_, i) => Math.max(0, 1 - Math.abs((i + first - centre + 0.5) * narrow)));
      const whole = 1 / shares.reduce((x, y) => x + y, 0);
      shares = Int32Array.from(shares, (share) => Math.trunc(0.5 + share * whole * 2 ** 22));
      for (let l = 0; l < lines; l++) {
        for (let c = 0; c < 3; c++) {
          let total = 2 ** 21;
          for (let i = 0, at = (l * from + first) * 3 + c; i < n; i++, at += 3) total += data[at] * shares[i];
          out[(o * lines + l) * 3 + c] = Math.min(255, Math.max(0, total >> 22));
        }
      }
    }
    return out;
  }

  function image_processor(image) { // RGB, size x size, as bytes: squashed, as the CLIP was trained
    const { width, height, data } = rgb_on_white(image), size = config.vision.image_size;
    const acrossFirst = (rgb, h, w) => resample(resample(rgb, h, w, size), size, h, size);
    // Pillow 13 begins with the columns of a tall picture; the rule was found by trying.
    if (height <= size || height <= 2 * width - size) return acrossFirst(data, height, width);
    return turn(acrossFirst(turn(data, height, width), width, height), size, size);
  }

  function pixels_to_patches(rgb) { // (v, d_img), by the frozen ViT, without CLS
    const { image_size, patch_size, mean, std, heads, layers } = config.vision, grid = image_size / patch_size;
    const flat = matrix(grid * grid, 3 * patch_size ** 2); // each patch as one row: (c y x)
    for (let y = 0; y < image_size; y++) {
      for (let x = 0; x < image_size; x++) {
        const patch = Math.floor(y / patch_size) * grid + Math.floor(x / patch_size);
        for (let c = 0; c < 3; c++) {
          const place = (c * patch_size + (y % patch_size)) * patch_size + (x % patch_size);
          flat.data[patch * flat.width + place] = (rgb[(y * image_size + x) * 3 + c] / 255 - mean[c]) / std[c];
        }
      }
    }
    const cls = weight("vision_encoder.class_embedding");
    let x = stack(matrix(1, cls.data.length, cls.data), linear(flat, "vision_encoder.conv1", false));
    x = layerNorm(add(x, weight("vision_encoder.positional_embedding")), "vision_encoder.ln_pre");
    for (let layer = 0; layer < layers; layer++) {
      const block = `vision_encoder.transformer.resblocks.${layer}`;
      const qkv = linear(layerNorm(x, `${block}.ln_1`), `${block}.attn.in_proj`);
      const read = attention(columns(qkv, 0, 3), columns(qkv, 1, 3), columns(qkv, 2, 3), heads);
      x = add(x, linear(read, `${block}.attn.out_proj`));
      const middle = each(linear(layerNorm(x, `${block}.ln_2`), `${block}.mlp.c_fc`), gelu);
      x = add(x, linear(middle, `${block}.mlp.c_proj`));
    }
    if (config.vision.ln_post) x = layerNorm(x, "vision_encoder.ln_post");
    return matrix(x.rows - 1, x.width, x.data.subarray(x.width));
  }

  // ---- A fixed number of latents: 02_perceiver.html ------------------------------------

  function feedForward(x, name) {
    return linear(each(linear(layerNorm(x, `${name}.0`), `${name}.1`, false), gelu), `${name}.3`, false);
  }

  function perceiverAttention(x, latents, name, noted) {
    const asking = layerNorm(latents, `${name}.norm_latents`);
    const kv = linear(stack(layerNorm(x, `${name}.norm_media`), asking), `${name}.to_kv`, false);
    const q = linear(asking, `${name}.to_q`, false);
    return linear(attention(q, columns(kv, 0, 2), columns(kv, 1, 2), config.perceiver.heads, null, noted), `${name}.to_out`, false);
  }

  function perceiverResampler(patches) { // (v, d_img) to media (n, d_img), and its weights, layer by layer
    let latents = weight("perceiver.latents");
    const weights = [], { depth, heads } = config.perceiver;
    for (let layer = 0; layer < depth; layer++) {
      const noted = matrix(heads * latents.rows, patches.rows + latents.rows);
      latents = add(latents, perceiverAttention(patches, latents, `perceiver.layers.${layer}.0`, noted));
      latents = add(latents, feedForward(latents, `perceiver.layers.${layer}.1`));
      weights.push(noted);
    }
    return { media: layerNorm(latents, "perceiver.norm"), on_patches: roll_out(weights.map((one) => mean_of_heads(one, heads))) };
  }

  function mean_of_heads(weights, heads) { // (heads * rows, keys) to (rows, keys)
    const mean = matrix(weights.rows / heads, weights.width);
    weights.data.forEach((share, i) => { mean.data[i % mean.data.length] += share / heads; });
    return mean;
  }

  // Which patches a latent is made of, (n, v): 11_looking_inside.html
  function roll_out(weights) {
    const n = weights[0].rows, v = weights[0].width - n;
    let mixed = matrix(n, v);
    for (const layer of weights) {
      const next = matrix(n, v);
      for (let i = 0; i < n; i++) {
        for (let p = 0; p < v; p++) {
          let total = mixed.data[i * v + p] + layer.data[i * layer.width + p];
          for (let j = 0; j < n; j++) total += layer.data[i * layer.width + v + j] * mixed.data[j * v + p];
          next.data[i * v + p] = total / 2;
        }
      }
      mixed = next;
    }
    for (let i = 0; i < n; i++) {
      const row = mixed.data.subarray(i * v, (i + 1) * v), sum = row.reduce((x, y) => x + y, 0);
      row.forEach((value, p) => { row[p] = value / sum; });
    }
    return mixed;
  }

  // ---- Who may look at which picture: 03_cross_attention.html --------------------------

  function text_time(media_locations) { // 0 before the first image, then 1, 2, …
    let time = 0;
    return media_locations.map((isImage) => (time += isImage ? 1 : 0));
  }

  const media_time = (T_img) => Array.from({ length: T_img }, (_, i) => i + 1);

  function text_to_media_mask(media_locations, T_img, only_attend_immediate_media = true) {
    const images = media_time(T_img);
    return text_time(media_locations).map((token) => images.map((image) => (only_attend_immediate_media ? token === image : token >= image)));
  }

  // The keys and values of the pictures are made once for a whole text: 08_generation.html
  function keys_values(media, name) {
    const kv = linear(media, `${name}.to_kv`, false);
    return { k: columns(kv, 0, 2), v: columns(kv, 1, 2) };
  }

  function maskedCrossAttention(x, { k, v }, may_look, name, noted) {
    const { heads, n } = config.cross_attention, q = linear(layerNorm(x, `${name}.norm`), `${name}.to_q`, false);
    const read = attention(q, k, v, heads, (row, key) => may_look[row][Math.floor(key / n)], noted);
    return linear(read, `${name}.to_out`, false);
  }

  function gatedCrossAttentionBlock(x, kv, may_look, name, gates, noted) {
    const gate = (which) => gates * Math.tanh(weight(`${name}.${which}_gate`).data[0]);
    x = add(x, maskedCrossAttention(x, kv, may_look, `${name}.attn`, noted), gate("attn"));
    return add(x, feedForward(x, `${name}.ff`), gate("ff"));
  }

  // ---- The language model, its layers wrapped: 04_flamingo_layer.html ------------------

  // A layer of OPT, norm first. `past` keeps keys and values of the text before: 08_generation.html
  function decoderLayer(x, past, name) {
    const normed = layerNorm(x, `${name}.self_attn_layer_norm`), before = past.k.rows;
    for (const [part, projection] of [["k", "k_proj"], ["v", "v_proj"]]) {
      past[part] = stack(past[part], linear(normed, `${name}.self_attn.${projection}`));
    }
    const q = linear(normed, `${name}.self_attn.q_proj`);
    const read = attention(q, past.k, past.v, config.language.heads, (row, key) => key <= before + row);
    x = add(x, linear(read, `${name}.self_attn.out_proj`));
    const middle = each(linear(layerNorm(x, `${name}.final_layer_norm`), `${name}.fc1`), (value) => Math.max(0, value));
    return add(x, linear(middle, `${name}.fc2`));
  }

  // The whole model: 05_model.html. A text under way remembers its pictures, its tokens, its past.
  function begin(pictures, gates) {
    const { layers, d } = config.language, media = pictures.map((picture) => picture.media).reduce(stack, matrix(0, config.vision.d));
    const blocks = config.cross_attention.layers, kv = new Map();
    for (const layer of blocks) kv.set(layer, keys_values(media, `lang_encoder.gated_cross_attn_layers.${layer}.attn`));
    const past = Array.from({ length: layers }, () => ({ k: matrix(0, d), v: matrix(0, d) }));
    return { pictures, gates, kv, past, ids: [], noted: [] };
  }

  function forward(state, ids) { // hidden states of the new tokens
    const table = weight("lang_encoder.model.decoder.embed_tokens.weight"), n_past = state.ids.length;
    const positions = weight("lang_encoder.model.decoder.embed_positions.weight");
    let x = matrix(ids.length, table.width);
    ids.forEach((id, r) => {
      const place = (n_past + r + config.language.position_offset) * x.width;
      for (let i = 0; i < x.width; i++) x.data[r * x.width + i] = table.data[id * x.width + i] + positions.data[place + i];
    });
    state.ids.push(...ids);
    const T_img = state.pictures.length, isImage = state.ids.map((id) => id === config.media_token_id);
    const may_look = text_to_media_mask(isImage, T_img, config.cross_attention.immediate).slice(n_past);
    const maps = ids.map(() => []), { heads } = config.cross_attention; // for each new token, block and head: weights on the latents
    for (let layer = 0; layer < config.language.layers; layer++) {
      if (state.kv.has(layer)) {
        const noted = matrix(heads * ids.length, T_img * config.cross_attention.n);
        x = gatedCrossAttentionBlock(x, state.kv.get(layer), may_look, `lang_encoder.gated_cross_attn_layers.${layer}`, state.gates, noted);
        const row = (i) => noted.data.subarray(i * noted.width, (i + 1) * noted.width);
        maps.forEach((map, r) => map.push(Array.from({ length: heads }, (_, h) => row(h * ids.length + r))));
      }
      x = decoderLayer(x, state.past[layer], `lang_encoder.old_decoder_blocks.${layer}`);
    }
    state.noted.push(...maps);
    return layerNorm(x, "lang_encoder.model.decoder.final_layer_norm");
  }

  function head(x) { // logits, (T_txt, vocab); the head is the embedding table again
    const table = weight("lang_encoder.model.decoder.embed_tokens.weight"), logits = matrix(x.rows, table.rows);
    times(x, table, logits);
    return logits;
  }

  // Where the token at `place` looks, (v,) for each block, head and picture: 11_looking_inside.html
  function attention_maps(state, place) {
    const n = config.cross_attention.n;
    return state.noted[place].map((block) => block.map((on_latents) => state.pictures.map(({ on_patches }, image) => {
      const v = on_patches.width, map = new Float32Array(v);
      for (let i = 0; i < n; i++) for (let p = 0; p < v; p++) map[p] += on_latents[image * n + i] * on_patches.data[i * v + p];
      return map;
    })));
  }

  // The mean of some of those maps, for one picture: of one block, of one head, or (-1) of all.
  function mean_map(maps, image, block = -1, head = -1) {
    const some = maps.filter((_, b) => block < 0 || b === block).flatMap((heads) => heads.filter((_, h) => head < 0 || h === head));
    return some[0][image].map((_, p) => some.reduce((sum, images) => sum + images[image][p] / some.length, 0));
  }

  // ---- Words to numbers and back: byte-level BPE, B_tiny_opt.html ----------------------

  const PIECES = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;
  const byteLetters = (() => { // GPT-2's letter for each byte: printable ones stand for themselves
    let next = 256;
    return Array.from({ length: 256 }, (_, b) => String.fromCharCode((b > 32 && b < 127) || (b > 160 && b !== 173) ? b : next++));
  })();
  const letterBytes = new Map(byteLetters.map((letter, b) => [letter, b]));

  function bpe(piece) { // join the pair that was learned first, until no pair is known
    let parts = Array.from(new TextEncoder().encode(piece), (b) => byteLetters[b]);
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = tokenizer.ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return parts.map((part) => tokenizer.vocab.get(part));
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  function encode(text) {
    const ids = [...tokenizer.first];
    for (const part of text.split(tokenizer.splitter)) {
      if (tokenizer.special.has(part)) ids.push(tokenizer.special.get(part));
      else for (const piece of part.match(PIECES) || []) ids.push(...bpe(piece));
    }
    return ids;
  }

  function decode(ids, skip_special_tokens = true) {
    const special = new Set(tokenizer.special.values()), bytes = [], utf8 = new TextEncoder();
    for (const id of ids) {
      if (!special.has(id)) bytes.push(...Array.from(tokenizer.words[id], (letter) => letterBytes.get(letter)));
      else if (!skip_special_tokens) bytes.push(...utf8.encode(tokenizer.words[id]));
    }
    return new TextDecoder().decode(new Uint8Array(bytes));
  }

  // ---- It writes: 08_generation.html ---------------------------------------------------

  const seen = new Map(); // media of pictures by their pixels: each is encoded once
  const breathe = () => new Promise((go) => setTimeout(go));

  async function encode_pictures(images) {
    const pictures = [];
    for (const image of Array.isArray(images) ? images : [images]) {
      const rgb = image_processor(image), key = Array.from(rgb, (byte) => String.fromCharCode(byte)).join("");
      if (!seen.has(key)) {
        await breathe();
        if (seen.size >= 200) seen.clear();
        seen.set(key, perceiverResampler(pixels_to_patches(rgb)));
      }
      pictures.push(seen.get(key));
    }
    return pictures;
  }

  async function prepare(images, prompt, room, gates) {
    await load();
    const ids = encode(prompt), count = ids.filter((id) => id === config.media_token_id).length;
    images = Array.isArray(images) ? images : [images];
    if (images.length !== count) throw new Error(`${images.length} pictures, but ${count} <image> in the prompt`);
    const most = config.language.max_position_embeddings;
    if (ids.length + room > most) throw new Error(`a prompt of ${ids.length} tokens and ${room} new ones: the model reads ${most}`);
    return { ids, state: begin(await encode_pictures(images), gates) };
  }

  async function logits(images, prompt, { gates = 1 } = {}) {
    const { ids, state } = await prepare(images, prompt, 0, gates), all = head(forward(state, ids));
    return ids.map((_, r) => all.data.slice(r * all.width, (r + 1) * all.width));
  }

  // ---- What a text costs: 06_loss.html -------------------------------------------------

  const IGNORE = -100;

  function make_labels(ids) { // the text of each chunk, and its end
    let open = false;
    return ids.map((id) => {
      const label = open && id !== config.media_token_id ? id : IGNORE;
      open = id === config.media_token_id || (open && id !== config.eoc_token_id);
      return label;
    });
  }

  function log_p(row, id) { // of a token, where `row` has the logits before it
    const top = row.reduce((x, y) => Math.max(x, y)), sum = row.reduce((total, logit) => total + Math.exp(logit - top), 0);
    return row[id] - top - Math.log(sum);
  }

  // Each token of a text: {id, text, loss, image, maps}. `loss` is null where there is no label;
  // `image` and `maps` are of the token before it, from which it is predicted.
  async function token_losses(images, text, { gates = 1 } = {}) {
    const { ids, state } = await prepare(images, text, 0, gates), logits = head(forward(state, ids));
    const times = text_time(ids.map((id) => id === config.media_token_id)), labels = make_labels(ids);
    return ids.map((id, place) => {
      const row = logits.data.subarray((place - 1) * logits.width, place * logits.width), seen = place > 0;
      const loss = seen && labels[place] !== IGNORE ? -log_p(row, id) : null;
      return { id, text: decode([id], false), loss, image: seen ? times[place - 1] : 0, maps: seen ? attention_maps(state, place - 1) : [] };
    });
  }

  // Without blanks and marks of no width at the ends: each would be a token of its own.
  const trim = (text) => text.replace(/^[\s\x1c-\x1f\x85\u200b-\u200d\u2060]+|[\s\x1c-\x1f\x85\u200b-\u200d\u2060]+$/g, "");

  function check_text(text, where) { // throws what cannot be a caption: 07_data.html
    if (typeof text !== "string" || !trim(text)) throw new Error(`${where}: the caption is empty or not a text`);
    if (/\p{Surrogate}/u.test(text)) throw new Error(`${where}: the caption is not valid Unicode`);
    for (const token of ["<image>", "<|endofchunk|>"]) {
      if (text.includes(token)) throw new Error(`${where}: take ${token} out of the caption`);
    }
  }

  // How likely each of some answers is after a prompt, its end included: sums of log-probabilities.
  async function score_candidates(images, prompt, candidates, { gates = 1, end = "<|endofchunk|>" } = {}) {
    if (!candidates.length) throw new Error("no candidates to score");
    candidates.forEach((text, i) => check_text(text, `candidate ${i + 1}`));
    await load();
    const bare = trim(prompt), follows = bare && !bare.endsWith("<image>"), blank = /[^\S\ufeff]$/.test(prompt) || /[:?.!,;]$/.test(bare);
    const rows = candidates.map((text) => encode(`${bare}${follows && (blank || /^[^\S\ufeff]/.test(text)) ? " " : ""}${trim(text)}${end}`)), alone = encode(bare);
    let n_same = 0; // how a prompt is cut into tokens may depend on what follows it
    while (n_same < alone.length && rows.every((row) => row[n_same] === alone[n_same] && n_same < row.length - 1)) n_same += 1;
    const longest = Math.max(...rows.map((row) => row.length)), { state } = await prepare(images, bare, longest - alone.length, gates);
    const shared = forward(state, alone.slice(0, n_same)), last = shared.data.subarray((n_same - 1) * shared.width);
    return rows.map((row) => { // each goes on from what they share; matrices of the past are never changed
      const own = { ...state, ids: [...state.ids], noted: [], past: state.past.map((layer) => ({ ...layer })) };
      const rest = row.slice(n_same), new_ids = rest.slice(0, -1);
      const after = new_ids.length ? forward(own, new_ids) : matrix(0, shared.width);
      const logits = head(stack(matrix(1, shared.width, last), after));
      return rest.reduce((sum, id, r) => sum + log_p(logits.data.subarray(r * logits.width, (r + 1) * logits.width), id), 0);
    });
  }

  // Greedy, until <|endofchunk|>, never <image>. `onToken` is told of each token as it is written, and
  // of those of the prompt first: {id, text, written, image, maps, p}; if it returns false, we stop.
  // Blanks at the prompt's ends are left out: one would be a token, which else begins the next word.
  async function caption(images, prompt = "<image>", { max_new_tokens = 24, gates = 1, onToken } = {}) {
    const { ids, state } = await prepare(images, trim(prompt), max_new_tokens, gates), written = [];
    const tell = (id, place, isNew, p) => {
      const image = text_time(state.ids.slice(0, place + 1).map((token) => token === config.media_token_id)).pop();
      return onToken && onToken({ id, text: decode([id], false), written: isNew, image, p, maps: attention_maps(state, place) });
    };
    let hidden = forward(state, ids);
    ids.forEach((id, place) => tell(id, place, false));
    while (written.length < max_new_tokens) {
      const last = matrix(1, hidden.width, hidden.data.subarray((hidden.rows - 1) * hidden.width));
      const row = head(last).data;
      row[config.media_token_id] = -Infinity;
      const id = row.indexOf(row.reduce((x, y) => Math.max(x, y)));
      const p = Math.exp(log_p(row, id));
      const stop = tell(id, state.ids.length - 1, true, p) === false; // looked at by the token before
      if (id === config.eoc_token_id || stop) break;
      written.push(id);
      if (onToken) await breathe();
      if (written.length < max_new_tokens) hidden = forward(state, [id]);
    }
    return decode(written).trim();
  }

  // ---- The weights' file ---------------------------------------------------------------

  // Each character carries seven bits; five that a string cannot hold are written 128 higher.
  function bits(text, width, count, use) {
    let buffer = 0, have = 0, at = 0;
    for (let i = 0; i < count; i++) {
      while (have < width) {
        buffer = ((buffer << 7) | (text.charCodeAt(at++) & 127)) & 0xffffff;
        have += 7;
      }
      have -= width;
      use(i, (buffer >> have) & ((1 << width) - 1));
    }
  }

  const float8 = Float32Array.from({ length: 256 }, (_, b) => { // float8_e4m3fn: sign, 4 bits, 3 bits
    const exponent = (b >> 3) & 15, size = exponent ? 2 ** (exponent - 7) * (1 + (b & 7) / 8) : 2 ** -6 * ((b & 7) / 8);
    return b & 128 ? -size : size;
  });

  function unpack({ kind, rows, width, scales, text }) {
    const x = matrix(rows, width), count = rows * width;
    if (kind === "float32") {
      const bytes = new Uint8Array(4 * count);
      bits(text, 8, 4 * count, (i, b) => { bytes[i] = b; });
      x.data = new Float32Array(bytes.buffer);
    } else if (kind === "float8") {
      bits(text, 8, count, (i, b) => { x.data[i] = float8[b]; });
    } else { // whole numbers of `kind` bits, times the scale of their row
      const scale = unpack(scales).data, middle = 2 ** (kind - 1);
      bits(text, kind, count, (i, b) => { x.data[i] = Math.fround((b - middle) * scale[Math.floor(i / width)]); });
    }
    return x;
  }

  let told = () => {}, arrived, loading;
  const unpacked = new Map(); // tensors by name: where `load` fails on the way, the next one goes on
  const here = document.currentScript.src;

  // From file:// a script can only be asked for as a whole; over http its bytes can be counted.
  async function fetchScript(address) {
    const script = document.createElement("script");
    if (location.protocol.startsWith("http")) {
      const answer = await fetch(address), total = Number(answer.headers.get("content-length")), parts = [];
      if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
      let got = 0;
      for (const reader = answer.body.getReader(); ;) {
        const { done, value } = await reader.read();
        if (done) break;
        parts.push(value);
        told("reading", total ? Math.min(1, (got += value.length) / total) : undefined);
      }
      address = URL.createObjectURL(new Blob(parts, { type: "text/javascript;charset=utf-8" }));
    }
    await new Promise((done, failed) => {
      Object.assign(script, { src: address, charset: "utf-8", onload: done, onerror: () => failed(new Error("cannot read the weights beside this page")) });
      document.head.append(script);
    });
    script.remove();
  }

  function load(progress) {
    if (progress) told = progress;
    loading = loading || (async () => {
      told("reading");
      if (!arrived) await fetchScript(new URL("flamingo_weights.js", here).href);
      const names = Object.keys(arrived.tensors);
      for (const [number, name] of names.entries()) {
        unpacked.set(name, unpack(arrived.tensors[name]));
        delete arrived.tensors[name]; // its text is as large again
        if (number % 8 === 7) await breathe(told("unpacking", (number + 1) / names.length));
      }
      const { vocab, merges, special, first } = arrived.tokenizer, words = [];
      for (const [word, id] of [...Object.entries(vocab), ...Object.entries(special)]) words[id] = word;
      const escaped = Object.keys(special).map((word) => word.replace(/[|\\{}()[\]^$+*?.]/g, "\\$&"));
      tokenizer = {
        words, first,
        vocab: new Map(Object.entries(vocab)),
        special: new Map(Object.entries(special)),
        ranks: new Map(merges.map((pair, rank) => [pair.join(" "), rank])),
        splitter: new RegExp(`(${escaped.join("|")})`),
      };
      config = arrived.config;
      tensors = unpacked;
      told("ready", 1);
      return { drawings: arrived.drawings, scenes: arrived.scenes, config };
    })();
    loading.catch(() => { loading = undefined; });
    return loading;
  }

  // ---- In a page -----------------------------------------------------------------------

  // Nothing is loaded before a click on this button. What `load` brings goes to `opened`; what it
  // returns, an element, gets the focus. At last the button is gone.
  function door(element, text, opened) {
    const make = (tag, about) => Object.assign(document.createElement(tag), about);
    const start = make("button", { type: "button", textContent: text, className: "play-start live-go" });
    const bar = make("progress", { max: 1, ariaLabel: "Loading the model", hidden: true });
    const said = make("p", { className: "play-said" });
    said.setAttribute("role", "status");
    start.addEventListener("click", async () => {
      start.disabled = true;
      bar.hidden = false;
      try {
        const brought = await load((what, share) => {
          if (share === undefined) bar.removeAttribute("value");
          else bar.value = share;
          const words = { reading: "Reading the weights …", unpacking: "Unpacking the weights …", ready: "" }[what];
          if (said.textContent !== words) said.textContent = words;
        });
        const first = await opened(brought);
        [start, bar, said].forEach((part) => part.remove());
        if (first) first.focus();
      } catch (error) {
        start.disabled = false;
        bar.hidden = true;
        said.textContent = `That did not work: ${error.message}`;
      }
    });
    element.append(start, bar, said);
  }

  function paint(canvas, map) { // a map (v,) laid over a picture: the most of it is the darkest
    const side = Math.sqrt(map.length), top = Math.max(...map, 1e-9), pixels = new ImageData(side, side);
    map.forEach((value, p) => pixels.data.set([214, 51, 108, Math.round((235 * value) / top)], 4 * p));
    Object.assign(canvas, { width: side, height: side }); // and that clears it
    canvas.getContext("2d", { willReadFrequently: true }).putImageData(pixels, 0, 0);
  }

  window.flamingoLite = {
    get ready() { return load(); },
    load, door, paint, mean_map, caption, logits, token_losses, score_candidates,
    receive(file) { arrived = file; },
    inside: { encode, decode, image_processor, rgb_on_white, text_time, media_time, text_to_media_mask, roll_out },
  };
})();
