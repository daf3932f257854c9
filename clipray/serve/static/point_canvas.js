// Draws many points with WebGL 2: one vertex each, whose colour is looked up by its code.

const VERTEX = `#version 300 es
in vec2 place; in float code; in float chosen;
uniform vec2 centre; uniform vec2 scale; uniform float size; uniform float dims;
uniform sampler2D palette;
out vec4 colour;
void main() {
  gl_Position = vec4((place - centre) * scale, 0.0, 1.0);
  bool isDim = dims > 0.5 && chosen < 0.5;
  gl_PointSize = isDim ? size * 0.7 : size;
  colour = vec4(texelFetch(palette, ivec2(int(code), 0), 0).rgb, isDim ? 0.12 : 0.85);
}`;
const FRAGMENT = `#version 300 es
precision mediump float;
in vec4 colour; out vec4 drawn;
void main() {
  float away = length(gl_PointCoord - 0.5) * 2.0;
  float alpha = colour.a * (1.0 - smoothstep(0.75, 1.0, away));
  drawn = vec4(colour.rgb * alpha, alpha);
}`;

export class PointCanvas {
  // Throws an Error where the browser has no WebGL 2.
  constructor(canvas) {
    this.canvas = canvas;
    this.gl = canvas.getContext("webgl2", { antialias: false, premultipliedAlpha: true });
    if (!this.gl) throw new Error("This browser has no WebGL 2, which draws the map.");
    this.program = linked(this.gl);
    this.gl.useProgram(this.program);
    this.gl.enable(this.gl.BLEND);
    this.gl.blendFunc(this.gl.ONE, this.gl.ONE_MINUS_SRC_ALPHA);
    this.count = 0;
    this.dims = false;
    this.centre = [0, 0];
    this.scale = 1; // px of the page for a unit of the map
    this.isDrawing = false;
  }

  setPlaces(places) {
    this.count = places.length / 2;
    this.#attribute("place", places, 2, this.gl.FLOAT);
    this.#attribute("chosen", new Uint8Array(this.count), 1, this.gl.UNSIGNED_BYTE);
  }

  // codes: Uint16Array of places in `palette`, a Uint8Array of 256 RGBA colours.
  setColours(codes, palette) {
    const gl = this.gl;
    this.#attribute("code", codes, 1, gl.UNSIGNED_SHORT);
    gl.bindTexture(gl.TEXTURE_2D, this.texture ??= gl.createTexture());
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, palette);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    this.draw();
  }

  // numbers: of points that stand out; empty for none.
  choose(numbers) {
    const chosen = new Uint8Array(this.count);
    for (const number of numbers) chosen[number] = 1;
    this.dims = numbers.length > 0;
    this.#attribute("chosen", chosen, 1, this.gl.UNSIGNED_BYTE);
    this.draw();
  }

  fit({ left, right, bottom, top }) {
    const { clientWidth, clientHeight } = this.canvas;
    this.centre = [(left + right) / 2, (bottom + top) / 2];
    this.scale = 0.92 * Math.min(clientWidth / (right - left || 1), clientHeight / (top - bottom || 1));
    this.whole = this.scale;
    this.draw();
  }

  moveBy(dx, dy) {
    this.centre = [this.centre[0] - dx / this.scale, this.centre[1] + dy / this.scale];
    this.draw();
  }

  // (x, y): the place on the canvas, in px, that stays where it is.
  zoomBy(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const before = this.toMap(x, y);
    this.scale = Math.min(Math.max(this.scale * factor, this.whole / 4), this.whole * 20_000);
    const after = this.toMap(x, y);
    this.centre = [this.centre[0] + before[0] - after[0], this.centre[1] + before[1] - after[1]];
    this.draw();
  }

  // The place on the map of a place on the canvas, in px.
  toMap(x, y) {
    const { clientWidth, clientHeight } = this.canvas;
    return [this.centre[0] + (x - clientWidth / 2) / this.scale, this.centre[1] - (y - clientHeight / 2) / this.scale];
  }

  // The size of a point in px of the page: smaller where there are many, larger as one comes closer.
  get pointSize() {
    const closer = Math.log2(Math.max(this.scale / this.whole, 1));
    return Math.min(Math.max(14 - 2 * Math.log10(this.count + 1) + 1.2 * closer, 2) , 16);
  }

  draw() {
    if (this.isDrawing) return;
    this.isDrawing = true;
    requestAnimationFrame(() => {
      this.isDrawing = false;
      this.#draw();
    });
  }

  #draw() {
    const gl = this.gl, { canvas } = this, ratio = devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    gl.viewport(0, 0, width, height);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    if (!this.count || !this.texture) return;
    gl.uniform2fv(this.#uniform("centre"), this.centre);
    gl.uniform2f(this.#uniform("scale"), (2 * this.scale) / canvas.clientWidth, (2 * this.scale) / canvas.clientHeight);
    gl.uniform1f(this.#uniform("size"), this.pointSize * ratio);
    gl.uniform1f(this.#uniform("dims"), this.dims ? 1 : 0);
    gl.drawArrays(gl.POINTS, 0, this.count);
  }

  #uniform(name) {
    return this.gl.getUniformLocation(this.program, name);
  }

  #attribute(name, data, size, type) {
    const gl = this.gl, place = gl.getAttribLocation(this.program, name);
    this.buffers ??= {};
    gl.bindBuffer(gl.ARRAY_BUFFER, (this.buffers[name] ??= gl.createBuffer()));
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, size, type, false, 0, 0);
  }
}

function linked(gl) {
  const program = gl.createProgram();
  for (const [type, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(type);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  return program;
}
