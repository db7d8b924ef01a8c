// Bytes of a stream without gaps -> rows of whole words: a row is `row_bytes` bytes and starts in
// a new word; what is left of its last word is zero.
`default_nettype none
module gatelet_unpack #(
    parameter SIMD = 8
) (
    input  wire              clk,
    input  wire              clear,
    input  wire              enable,
    input  wire [15:0]       row_bytes,
    input  wire [SIMD*8-1:0] s_data,
    input  wire [SIMD-1:0]   s_keep,
    input  wire              s_last,
    input  wire              s_valid,
    output wire              s_ready,
    output wire [SIMD*8-1:0] word,
    output wire              word_valid,
    output wire              row_end,
    output wire              empty,     // nothing is left after this word and the packet has ended
    output wire              starved    // the packet has ended inside a row
);
  localparam CW = 8;
  reg [2*SIMD*8-1:0] store;
  reg [CW-1:0] count;
  reg ended;
  reg [15:0] left;  // bytes of this row that are still to come; 0 stands for a new row

  wire [15:0] rest = left == 16'd0 ? row_bytes : left;
  wire short_word = rest <= SIMD;
  wire [CW-1:0] take = short_word ? rest[CW-1:0] : SIMD;

  assign word_valid = enable && count >= take;
  assign row_end = word_valid && short_word;
  assign empty = ended && count == take;
  assign starved = enable && ended && count < take;
  assign s_ready = enable && !ended && count <= SIMD;

  reg [CW-1:0] arriving;
  reg [SIMD*8-1:0] mask, keep_mask;
  integer i;
  always @* begin
    arriving = 0;
    for (i = 0; i < SIMD; i = i + 1) begin
      arriving = arriving + {{(CW - 1) {1'b0}}, s_keep[i]};
      mask[i*8+:8] = {8{i < take}};
      keep_mask[i*8+:8] = {8{s_keep[i]}};
    end
  end
  assign word = store[SIMD*8-1:0] & mask;

  wire accept = s_valid && s_ready;
  wire [CW-1:0] kept = word_valid ? count - take : count;
  wire [2*SIMD*8-1:0] shifted = word_valid ? store >> {take, 3'd0} : store;

  always @(posedge clk) begin
    if (clear) begin
      store <= 0;
      count <= 0;
      ended <= 1'b0;
      left <= 16'd0;
    end else begin
      // Bytes above `kept` are zero, so that what arrives can be merged by OR.
      store <= accept ? shifted | ({{(SIMD * 8) {1'b0}}, s_data & keep_mask} << {kept, 3'd0}) : shifted;
      count <= accept ? kept + arriving : kept;
      if (accept && s_last) ended <= 1'b1;
      if (word_valid) left <= short_word ? 16'd0 : rest - SIMD;
    end
  end
endmodule
`default_nettype wire
