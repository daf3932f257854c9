// Points of the plane in the cells of a grid, to find those near a place or within a polygon.

const CELLS = 512;

export class GridIndex {
  // places: Float32Array of x and y, one after the other.
  constructor(places) {
    this.places = places;
    this.bounds = boundsOf(places);
    const count = places.length / 2;
    const cells = new Uint32Array(count);
    this.starts = new Uint32Array(CELLS * CELLS + 1);
    for (let n = 0; n < count; n++) {
      cells[n] = this.#cell(this.#column(places[2 * n]), this.#line(places[2 * n + 1]));
      this.starts[cells[n] + 1]++;
    }
    for (let cell = 0; cell < CELLS * CELLS; cell++) this.starts[cell + 1] += this.starts[cell];
    const next = this.starts.slice(0, -1);
    this.order = new Uint32Array(count);
    for (let n = 0; n < count; n++) this.order[next[cells[n]]++] = n;
  }

  // The number of the point nearest to (x, y), by distances in units of `unitX` and `unitY`, within 1; or -1.
  nearest(x, y, unitX, unitY) {
    let best = -1, least = 1;
    this.#each(x - unitX, y - unitY, x + unitX, y + unitY, (n) => {
      const away = Math.hypot((this.places[2 * n] - x) / unitX, (this.places[2 * n + 1] - y) / unitY);
      if (away <= least) [best, least] = [n, away];
    });
    return best;
  }

  // Numbers of the points within a polygon of [x, y] corners.
  within(polygon) {
    const xs = polygon.map(([x]) => x), ys = polygon.map(([, y]) => y);
    const numbers = [];
    this.#each(Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys), (n) => {
      if (isWithin(polygon, this.places[2 * n], this.places[2 * n + 1])) numbers.push(n);
    });
    return numbers.sort((a, b) => a - b);
  }

  #each(left, bottom, right, top, visit) {
    for (let line = this.#line(bottom); line <= this.#line(top); line++) {
      const first = this.#cell(this.#column(left), line), last = this.#cell(this.#column(right), line);
      for (let place = this.starts[first]; place < this.starts[last + 1]; place++) visit(this.order[place]);
    }
  }

  #column(x) {
    return clamped((x - this.bounds.left) / (this.bounds.right - this.bounds.left || 1));
  }

  #line(y) {
    return clamped((y - this.bounds.bottom) / (this.bounds.top - this.bounds.bottom || 1));
  }

  #cell(column, line) {
    return line * CELLS + column;
  }
}

function clamped(share) {
  return Math.max(0, Math.min(CELLS - 1, Math.floor(share * CELLS) || 0));
}

function boundsOf(places) {
  const bounds = { left: Infinity, right: -Infinity, bottom: Infinity, top: -Infinity };
  for (let n = 0; n < places.length; n += 2) {
    const x = places[n], y = places[n + 1];
    if (x < bounds.left) bounds.left = x;
    if (x > bounds.right) bounds.right = x;
    if (y < bounds.bottom) bounds.bottom = y;
    if (y > bounds.top) bounds.top = y;
  }
  return places.length ? bounds : { left: 0, right: 1, bottom: 0, top: 1 };
}

// Whether a ray from (x, y) to the left crosses an odd number of the polygon's sides.
function isWithin(polygon, x, y) {
  let inside = false;
  for (let n = 0, before = polygon.length - 1; n < polygon.length; before = n++) {
    const [x1, y1] = polygon[n], [x2, y2] = polygon[before];
    if (y1 > y !== y2 > y && x < ((x2 - x1) * (y - y1)) / (y2 - y1) + x1) inside = !inside;
  }
  return inside;
}
