// gatelet's int8 core: a program of layers, run on items that stream through.
// Register map, load format and instruction layout: docs/rtl.md.
`default_nettype none
module gatelet_core #(
    parameter PE = 16,            // outputs at once
    parameter SIMD = 8,           // products per output and cycle; the streams are SIMD bytes wide
    parameter RQ = 4,             // requantisers; divides SIMD, which divides PE
    parameter ACT_DEPTH = 2048,   // words of SIMD bytes in each of two activation buffers
    parameter WEIGHT_DEPTH = 2048,// words of SIMD bytes per PE
    parameter PARAM_DEPTH = 512,  // channels per requantiser
    parameter LAYERS = 32
) (
    input  wire              clk,
    input  wire              resetn,
    // AXI4-Lite
    input  wire [7:0]        s_axi_awaddr,
    input  wire              s_axi_awvalid,
    output wire              s_axi_awready,
    input  wire [31:0]       s_axi_wdata,
    input  wire [3:0]        s_axi_wstrb,
    input  wire              s_axi_wvalid,
    output wire              s_axi_wready,
    output wire [1:0]        s_axi_bresp,
    output reg               s_axi_bvalid,
    input  wire              s_axi_bready,
    input  wire [7:0]        s_axi_araddr,
    input  wire              s_axi_arvalid,
    output wire              s_axi_arready,
    output reg  [31:0]       s_axi_rdata,
    output wire [1:0]        s_axi_rresp,
    output reg               s_axi_rvalid,
    input  wire              s_axi_rready,
    // AXI4-Stream in
    input  wire [SIMD*8-1:0] s_axis_tdata,
    input  wire [SIMD-1:0]   s_axis_tkeep,
    input  wire              s_axis_tlast,
    input  wire              s_axis_tvalid,
    output wire              s_axis_tready,
    // AXI4-Stream out
    output wire [SIMD*8-1:0] m_axis_tdata,
    output wire [SIMD-1:0]   m_axis_tkeep,
    output wire              m_axis_tlast,
    output wire              m_axis_tvalid,
    input  wire              m_axis_tready
);
  localparam VERSION = 32'h0001_0000;
  localparam AA = $clog2(ACT_DEPTH), WA = $clog2(WEIGHT_DEPTH), PA = $clog2(PARAM_DEPTH);
  localparam LA = $clog2(LAYERS), IA = LA + 3;
  localparam LANE = $clog2(PE) + 1;

  localparam IDLE = 4'd0, HEAD = 4'd1, DATA = 4'd2, FILL = 4'd3, FETCH = 4'd4, INIT = 4'd5,
             RUN = 4'd6, FLUSH = 4'd7, SEND = 4'd8, FAILED = 4'd9;
  localparam OP_CONV = 16'd1, OP_MAX = 16'd2, OP_SUM = 16'd3;
  localparam E_TRUNCATED = 8'd1, E_HEADER = 8'd2, E_RANGE = 8'd3, E_OPCODE = 8'd4,
             E_PROGRAM = 8'd5, E_SECTION = 8'd6;
  // From the last tap of a layer until its last word is in the buffer, rounded up.
  localparam FLUSH_CYCLES = PE / RQ + 20;

  reg [3:0] state;
  reg [7:0] error;

  // ---------------------------------------------------------------- registers
  reg run, load, clear;
  reg [15:0] layers, tile, in_rows, in_bytes, out_rows, out_bytes, layer_select;
  reg [31:0] items_done, busy_cycles;
  reg [31:0] layer_cycles[0:LAYERS-1];

  wire write = s_axi_awvalid && s_axi_wvalid && !s_axi_bvalid;
  assign s_axi_awready = write;
  assign s_axi_wready = write;
  assign s_axi_bresp = 2'b00;
  assign s_axi_arready = s_axi_arvalid && !s_axi_rvalid;
  assign s_axi_rresp = 2'b00;

  reg [31:0] value;
  always @*
    case (s_axi_araddr[7:2])
      6'h00: value = 32'h47544C54;  // "GTLT"
      6'h01: value = VERSION;
      6'h02: value = {8'd0, RQ[7:0], SIMD[7:0], PE[7:0]};
      6'h03: value = ACT_DEPTH;
      6'h04: value = WEIGHT_DEPTH;
      6'h05: value = PARAM_DEPTH;
      6'h06: value = LAYERS;
      6'h08: value = {30'd0, load, run};
      6'h09: value = {12'd0, state, error, 5'd0, state == FAILED, state != IDLE, state == IDLE};
      6'h0A: value = {16'd0, layers};
      6'h0B: value = {16'd0, tile};
      6'h0C: value = {16'd0, in_rows};
      6'h0D: value = {16'd0, in_bytes};
      6'h0E: value = {16'd0, out_rows};
      6'h0F: value = {16'd0, out_bytes};
      6'h10: value = items_done;
      6'h11: value = busy_cycles;
      6'h12: value = {16'd0, layer_select};
      6'h13: value = layer_cycles[layer_select[LA-1:0]];
      default: value = 32'd0;
    endcase

  always @(posedge clk) begin
    clear <= 1'b0;
    if (!resetn) begin
      s_axi_bvalid <= 1'b0;
      s_axi_rvalid <= 1'b0;
      run <= 1'b0;
      load <= 1'b0;
      layers <= 16'd0;
      tile <= 16'd0;
      in_rows <= 16'd0;
      in_bytes <= 16'd0;
      out_rows <= 16'd0;
      out_bytes <= 16'd0;
      layer_select <= 16'd0;
      clear <= 1'b1;
    end else begin
      if (write) begin
        s_axi_bvalid <= 1'b1;
        // Partial writes are ignored: every register is one value.
        if (&s_axi_wstrb)
          case (s_axi_awaddr[7:2])
            6'h08: begin
              run <= s_axi_wdata[0];
              load <= s_axi_wdata[1];
              clear <= s_axi_wdata[2];
            end
            6'h0A: layers <= s_axi_wdata[15:0];
            6'h0B: tile <= s_axi_wdata[15:0];
            6'h0C: in_rows <= s_axi_wdata[15:0];
            6'h0D: in_bytes <= s_axi_wdata[15:0];
            6'h0E: out_rows <= s_axi_wdata[15:0];
            6'h0F: out_bytes <= s_axi_wdata[15:0];
            6'h12: layer_select <= s_axi_wdata[15:0];
            default: ;
          endcase
      end else if (s_axi_bready) s_axi_bvalid <= 1'b0;
      if (s_axi_arready) begin
        s_axi_rvalid <= 1'b1;
        s_axi_rdata <= value;
      end else if (s_axi_rready) s_axi_rvalid <= 1'b0;
    end
  end

  // ---------------------------------------------------------------- memories
  wire [63:0] head = s_axis_tdata[63:0];
  reg [ 1:0] load_target;
  reg [31:0] load_left;
  reg [23:0] load_address;
  reg [LANE-1:0] load_lane;
  wire [23:0] load_limit = load_target == 2'd1 ? WEIGHT_DEPTH
                         : load_target == 2'd2 ? PARAM_DEPTH : LAYERS * 8;
  wire loading = state == DATA && s_axis_tvalid && load_address < load_limit;

  reg [WA-1:0] weight_address;
  reg [PA-1:0] param_address;
  reg [IA-1:0] fetch_address;
  wire [PE*SIMD*8-1:0] weight_word;
  wire [RQ*64-1:0] param_word;
  wire [63:0] fetch_word;

  genvar g;
  generate
    for (g = 0; g < PE; g = g + 1) begin : g_weights
      gatelet_ram #(.WIDTH(SIMD * 8), .DEPTH(WEIGHT_DEPTH), .AW(WA)) ram (
          .clk(clk),
          .we(loading && load_target == 2'd1 && load_lane == g),
          .waddr(load_address[WA-1:0]),
          .wdata(s_axis_tdata),
          .raddr(weight_address),
          .rdata(weight_word[g*SIMD*8+:SIMD*8])
      );
    end
    for (g = 0; g < RQ; g = g + 1) begin : g_params
      gatelet_ram #(.WIDTH(64), .DEPTH(PARAM_DEPTH), .AW(PA)) ram (
          .clk(clk),
          .we(loading && load_target == 2'd2 && load_lane == g),
          .waddr(load_address[PA-1:0]),
          .wdata(head),
          .raddr(param_address),
          .rdata(param_word[g*64+:64])
      );
    end
  endgenerate
  gatelet_ram #(.WIDTH(64), .DEPTH(LAYERS * 8), .AW(IA)) program_ram (
      .clk(clk),
      .we(loading && load_target == 2'd3),
      .waddr(load_address[IA-1:0]),
      .wdata(head),
      .raddr(fetch_address),
      .rdata(fetch_word)
  );

  // Two activation buffers: the layer with an even number reads 0 and writes 1.
  reg odd;
  reg act_we0, act_we1;
  reg [AA-1:0] act_waddr;
  reg [SIMD*8-1:0] act_wdata;
  wire [AA-1:0] act_raddr;
  wire [SIMD*8-1:0] act_word0, act_word1;
  wire [SIMD*8-1:0] act_word = odd ? act_word1 : act_word0;
  gatelet_ram #(.WIDTH(SIMD * 8), .DEPTH(ACT_DEPTH), .AW(AA)) act0 (
      .clk(clk), .we(act_we0), .waddr(act_waddr), .wdata(act_wdata),
      .raddr(act_raddr), .rdata(act_word0)
  );
  gatelet_ram #(.WIDTH(SIMD * 8), .DEPTH(ACT_DEPTH), .AW(AA)) act1 (
      .clk(clk), .we(act_we1), .waddr(act_waddr), .wdata(act_wdata),
      .raddr(act_raddr), .rdata(act_word1)
  );

  // ---------------------------------------------------------------- streams
  wire flush_streams = clear || state == IDLE;
  wire unpack_ready, fill_valid, fill_row_end, fill_empty, fill_starved;
  wire [SIMD*8-1:0] fill_word;
  gatelet_unpack #(.SIMD(SIMD)) unpack (
      .clk(clk), .clear(flush_streams), .enable(state == FILL), .row_bytes(in_bytes),
      .s_data(s_axis_tdata), .s_keep(s_axis_tkeep), .s_last(s_axis_tlast),
      .s_valid(s_axis_tvalid), .s_ready(unpack_ready),
      .word(fill_word), .word_valid(fill_valid), .row_end(fill_row_end),
      .empty(fill_empty), .starved(fill_starved)
  );
  assign s_axis_tready = state == HEAD || state == DATA || state == FAILED || unpack_ready;

  reg final_tile, send_valid, sent_all;
  wire pack_ready, pack_empty;
  reg [15:0] send_left;
  wire [15:0] send_rest = send_left == 16'd0 ? out_bytes : send_left;
  wire send_short = send_rest <= SIMD;
  gatelet_pack #(.SIMD(SIMD)) pack (
      .clk(clk), .clear(flush_streams),
      .word(act_word), .word_bytes(send_short ? send_rest[7:0] : SIMD[7:0]),
      .word_valid(send_valid), .word_ready(pack_ready),
      .finish(final_tile && sent_all), .empty(pack_empty),
      .m_data(m_axis_tdata), .m_keep(m_axis_tkeep), .m_last(m_axis_tlast),
      .m_valid(m_axis_tvalid), .m_ready(m_axis_tready)
  );
  wire sending = send_valid && pack_ready;

  // ---------------------------------------------------------------- instruction
  reg [511:0] ir;
  reg [3:0] fetch_count;
  wire [15:0] op = ir[0*16+:16];
  wire [15:0] in_h = ir[1*16+:16], in_w = ir[2*16+:16];
  wire [15:0] out_h = ir[3*16+:16], out_w = ir[4*16+:16];
  wire [15:0] groups = ir[5*16+:16];
  wire [15:0] kernel_h = ir[6*16+:16], kernel_w = ir[7*16+:16], inner = ir[8*16+:16];
  wire [15:0] stride_h = ir[9*16+:16], stride_w = ir[10*16+:16];
  wire [15:0] pad_top = ir[11*16+:16], pad_left = ir[12*16+:16];
  wire [15:0] dilation_h = ir[13*16+:16], dilation_w = ir[14*16+:16];
  wire [15:0] step_item = ir[15*16+:16], step_oy = ir[16*16+:16], step_ox = ir[17*16+:16];
  wire [15:0] step_g = ir[18*16+:16], step_ky = ir[19*16+:16], step_kx = ir[20*16+:16];
  wire [15:0] origin = ir[21*16+:16], weight_base = ir[22*16+:16], param_base = ir[23*16+:16];
  wire [15:0] out_words = ir[24*16+:16];
  wire signed [7:0] zero_in = ir[25*16+:8], zero_out = ir[25*16+8+:8];
  wire signed [7:0] clamp_low = ir[26*16+:8], clamp_high = ir[26*16+8+:8];
  wire [15:0] row_steps = ir[27*16+:16], row_words = ir[28*16+:16];
  wire is_conv = op == OP_CONV, is_max = op == OP_MAX, is_sum = op == OP_SUM;

  // ---------------------------------------------------------------- address generator
  reg [15:0] items, layer;
  reg [15:0] n, oy, ox, og, ky, kx, kc;
  reg [15:0] a_n, a_oy, a_ox, a_g, a_ky, a_kx, address;
  reg [16:0] iy0, ix0, iy, ix;  // two's complement; negative is far outside when read unsigned
  reg [7:0] gap;
  reg [15:0] layer_timer_flush;
  reg [31:0] timer;

  wire kc_end = kc == inner - 16'd1, kx_end = kx == kernel_w - 16'd1, ky_end = ky == kernel_h - 16'd1;
  wire og_end = og == groups - 16'd1, ox_end = ox == out_w - 16'd1, oy_end = oy == out_h - 16'd1;
  wire n_end = n == items - 16'd1;
  wire tap_first = kc == 16'd0 && kx == 16'd0 && ky == 16'd0;
  wire tap_last = kc_end && kx_end && ky_end;
  wire inside_h = iy < {1'b0, in_h}, inside_w = ix < {1'b0, in_w};
  // The ends of groups are as far apart as the requantisers need; nothing behind ever waits.
  wire issue = state == RUN && (gap == 8'd0 || !tap_last || is_max);
  wire [7:0] drain_steps = is_sum ? SIMD / RQ : PE / RQ;

  wire [15:0] to_kx = a_kx + step_kx, to_ky = a_ky + step_ky, to_g = a_g + step_g;
  wire [15:0] to_ox = a_ox + step_ox, to_oy = a_oy + step_oy, to_n = a_n + step_item;
  wire [16:0] iy_top = -{1'b0, pad_top}, ix_left = -{1'b0, pad_left};

  reg [AA-1:0] send_address;
  wire [AA-1:0] send_next = send_address + {{(AA - 1) {1'b0}}, sending};
  assign act_raddr = state == SEND ? send_next : address[AA-1:0];

  // One cycle later the words are there.
  reg t_valid, t_first, t_last, t_inside;
  always @(posedge clk) begin
    t_valid <= issue && resetn && !clear;
    t_first <= tap_first;
    t_last <= tap_last;
    t_inside <= inside_h && inside_w;
  end
  wire signed [7:0] outside = is_max ? -8'sd128 : zero_in;
  wire [SIMD*8-1:0] tap = t_inside ? act_word : {SIMD{outside}};

  // ---------------------------------------------------------------- arithmetic
  wire [PE*32-1:0] dot_sums;
  wire dot_done;
  gatelet_array #(.PE(PE), .SIMD(SIMD)) array (
      .clk(clk), .resetn(resetn && !clear),
      .valid(t_valid && is_conv), .first(t_first), .last(t_last),
      .values(tap), .weights(weight_word), .sums(dot_sums), .done(dot_done)
  );

  // Lane by lane: maximum, or sum, of a window.
  reg [SIMD*8-1:0] p_tap, lane_max;
  reg [SIMD*32-1:0] lane_sum;
  reg p_valid, p_first, p_last, pool_done;
  integer i;
  always @(posedge clk) begin
    p_tap <= tap;
    p_valid <= t_valid && !is_conv;
    p_first <= t_first;
    p_last <= t_last;
    pool_done <= p_valid && p_last;
    if (p_valid)
      for (i = 0; i < SIMD; i = i + 1) begin
        if (p_first || $signed(p_tap[i*8+:8]) > $signed(lane_max[i*8+:8]))
          lane_max[i*8+:8] <= p_tap[i*8+:8];
        lane_sum[i*32+:32] <= (p_first ? 32'd0 : lane_sum[i*32+:32])
                            + {{24{p_tap[i*8+7]}}, p_tap[i*8+:8]};
      end
  end

  // Sums leave RQ at a time.
  reg [PE*32-1:0] drain;
  reg [7:0] drain_left;
  reg [15:0] param_step;
  reg [RQ*32-1:0] lane;
  reg lane_valid;
  wire drain_load = dot_done || (pool_done && is_sum);
  wire draining = drain_left != 8'd0;
  always @(posedge clk) begin
    lane <= drain[RQ*32-1:0];
    lane_valid <= draining;
    if (!resetn || clear || state == INIT) begin
      drain_left <= 8'd0;
      param_step <= 16'd0;
      param_address <= param_base[PA-1:0];
    end else begin
      if (draining) begin
        if (param_step == row_steps - 16'd1) begin
          param_step <= 16'd0;
          param_address <= param_base[PA-1:0];
        end else begin
          param_step <= param_step + 16'd1;
          param_address <= param_address + 1'b1;
        end
      end
      if (drain_load) begin
        if (is_sum) drain <= lane_sum;
        else drain <= dot_sums;
        drain_left <= drain_steps;
      end else if (draining) begin
        drain <= drain >> (RQ * 32);
        drain_left <= drain_left - 8'd1;
      end
    end
  end

  wire [RQ*8-1:0] quantised;
  generate
    for (g = 0; g < RQ; g = g + 1) begin : g_requantise
      gatelet_requantise unit (
          .clk(clk), .sum(lane[g*32+:32]),
          .bias(param_word[g*64+:32]), .multiplier(param_word[g*64+32+:32]),
          .zero(zero_out), .low(clamp_low), .high(clamp_high), .result(quantised[g*8+:8])
      );
    end
  endgenerate
  reg [8:0] q_pipe;
  wire q_valid = q_pipe[8];
  always @(posedge clk) q_pipe <= (!resetn || clear) ? 9'd0 : {q_pipe[7:0], lane_valid};

  // ---------------------------------------------------------------- results
  localparam STEPS = SIMD / RQ;
  reg [7:0] word_step;
  reg [SIMD*8-1:0] word;
  reg [15:0] word_index;
  reg [AA-1:0] result_address;
  reg [SIMD*8-1:0] word_next;
  always @* begin
    word_next = word >> (RQ * 8);
    word_next[(SIMD-RQ)*8+:RQ*8] = quantised;
  end
  wire word_done = q_valid && word_step == STEPS - 1;
  wire pooled = pool_done && is_max;
  // Channels that only fill up the last group of outputs are dropped.
  wire result_valid = pooled || (word_done && word_index < out_words);

  always @(posedge clk) begin
    act_we0 <= 1'b0;
    act_we1 <= 1'b0;
    if (state == FILL) begin
      act_we0 <= fill_valid;
      act_waddr <= result_address;
      act_wdata <= fill_word;
    end else begin
      act_we0 <= result_valid && odd;
      act_we1 <= result_valid && !odd;
      act_waddr <= result_address;
      act_wdata <= pooled ? lane_max : word_next;
    end
    if (!resetn || clear || state == INIT || state == IDLE || state == SEND) begin
      word_step <= 8'd0;
      word_index <= 16'd0;
      result_address <= 0;
    end else begin
      if (q_valid) begin
        word <= word_next;
        word_step <= word_done ? 8'd0 : word_step + 8'd1;
      end
      if (word_done) word_index <= word_index == row_words - 16'd1 ? 16'd0 : word_index + 16'd1;
      if (result_valid || (state == FILL && fill_valid)) result_address <= result_address + 1'b1;
    end
  end

  // ---------------------------------------------------------------- sequence
  reg [15:0] row, send_row, send_item;
  wire item_end = fill_row_end && row == in_rows - 16'd1;
  wire send_row_end = sending && send_short;
  wire send_item_end = send_row_end && send_row == out_rows - 16'd1;
  wire [LANE-1:0] lanes = load_target == 2'd1 ? PE : load_target == 2'd2 ? RQ : 1;

  always @(posedge clk) begin
    if (!resetn || clear) begin
      state <= IDLE;
      error <= 8'd0;
      items_done <= 32'd0;
      busy_cycles <= 32'd0;
      send_valid <= 1'b0;
      sent_all <= 1'b0;
      final_tile <= 1'b0;
      odd <= 1'b0;
      items <= 16'd0;
      row <= 16'd0;
      gap <= 8'd0;
    end else begin
      if (state != IDLE && state != FAILED) busy_cycles <= busy_cycles + 32'd1;
      if (gap != 8'd0) gap <= gap - 8'd1;
      timer <= timer + 32'd1;
      case (state)
        IDLE: begin
          items <= 16'd0;
          row <= 16'd0;
          odd <= 1'b0;
          final_tile <= 1'b0;
          sent_all <= 1'b0;
          if (s_axis_tvalid) begin
            if (load) state <= HEAD;
            else if (run) begin
              if (layers == 0 || layers > LAYERS || tile == 0 || in_rows == 0 || in_bytes == 0
                  || out_rows == 0 || out_bytes == 0) begin
                state <= FAILED;
                error <= E_PROGRAM;
              end else state <= FILL;
            end
          end
        end

        HEAD:
        if (s_axis_tvalid) begin
          load_target <= head[1:0];
          load_address <= head[31:8];
          load_left <= head[63:32];
          load_lane <= 0;
          state <= DATA;
          if (head[7:2] != 0 || head[1:0] == 0 || head[63:32] == 0) begin
            state <= FAILED;
            error <= E_HEADER;
          end else if (s_axis_tlast) begin
            state <= FAILED;
            error <= E_SECTION;
          end
        end

        DATA:
        if (s_axis_tvalid) begin
          load_left <= load_left - 32'd1;
          if (load_lane == lanes - 1'b1) begin
            load_lane <= 0;
            load_address <= load_address + 24'd1;
          end else load_lane <= load_lane + 1'b1;
          if (load_address >= load_limit) begin
            state <= FAILED;
            error <= E_RANGE;
          end else if (load_left == 32'd1) state <= s_axis_tlast ? IDLE : HEAD;
          else if (s_axis_tlast) begin
            state <= FAILED;
            error <= E_SECTION;
          end
        end

        FILL: begin
          layer <= 16'd0;
          fetch_address <= 0;
          fetch_count <= 4'd0;
          odd <= 1'b0;
          if (fill_starved) begin
            state <= FAILED;
            error <= E_TRUNCATED;
          end else if (fill_row_end) begin
            row <= item_end ? 16'd0 : row + 16'd1;
            if (item_end) begin
              items <= items + 16'd1;
              final_tile <= fill_empty;
              if (fill_empty || items + 16'd1 == tile) state <= FETCH;
            end
          end
        end

        FETCH: begin
          timer <= 32'd0;
          fetch_count <= fetch_count + 4'd1;
          if (fetch_count < 4'd8) fetch_address <= fetch_address + 1'b1;
          if (fetch_count != 4'd0) ir <= {fetch_word, ir[511:64]};
          if (fetch_count == 4'd8) state <= INIT;
        end

        INIT: begin
          n <= 16'd0;
          oy <= 16'd0;
          ox <= 16'd0;
          og <= 16'd0;
          ky <= 16'd0;
          kx <= 16'd0;
          kc <= 16'd0;
          a_n <= origin;
          a_oy <= origin;
          a_ox <= origin;
          a_g <= origin;
          a_ky <= origin;
          a_kx <= origin;
          address <= origin;
          iy0 <= iy_top;
          iy <= iy_top;
          ix0 <= ix_left;
          ix <= ix_left;
          weight_address <= weight_base[WA-1:0];
          gap <= 8'd0;
          state <= RUN;
          if (!(is_conv || is_max || is_sum)) begin
            state <= FAILED;
            error <= E_OPCODE;
          end
        end

        RUN:
        if (issue) begin
          layer_timer_flush <= FLUSH_CYCLES;
          if (tap_last) gap <= drain_steps - 8'd1;
          weight_address <= tap_last && og_end ? weight_base[WA-1:0] : weight_address + 1'b1;
          kc <= kc_end ? 16'd0 : kc + 16'd1;
          address <= address + 16'd1;
          if (kc_end) begin
            kx <= kx_end ? 16'd0 : kx + 16'd1;
            ix <= ix + {1'b0, dilation_w};
            a_kx <= to_kx;
            address <= to_kx;
            if (kx_end) begin
              ky <= ky_end ? 16'd0 : ky + 16'd1;
              ix <= ix0;
              iy <= iy + {1'b0, dilation_h};
              a_ky <= to_ky;
              a_kx <= to_ky;
              address <= to_ky;
              if (ky_end) begin
                og <= og_end ? 16'd0 : og + 16'd1;
                iy <= iy0;
                a_g <= to_g;
                a_ky <= to_g;
                a_kx <= to_g;
                address <= to_g;
                if (og_end) begin
                  ox <= ox_end ? 16'd0 : ox + 16'd1;
                  ix0 <= ix0 + {1'b0, stride_w};
                  ix <= ix0 + {1'b0, stride_w};
                  a_ox <= to_ox;
                  a_g <= to_ox;
                  a_ky <= to_ox;
                  a_kx <= to_ox;
                  address <= to_ox;
                  if (ox_end) begin
                    oy <= oy_end ? 16'd0 : oy + 16'd1;
                    ix0 <= ix_left;
                    ix <= ix_left;
                    iy0 <= iy0 + {1'b0, stride_h};
                    iy <= iy0 + {1'b0, stride_h};
                    a_oy <= to_oy;
                    a_ox <= to_oy;
                    a_g <= to_oy;
                    a_ky <= to_oy;
                    a_kx <= to_oy;
                    address <= to_oy;
                    if (oy_end) begin
                      n <= n + 16'd1;
                      iy0 <= iy_top;
                      iy <= iy_top;
                      a_n <= to_n;
                      a_oy <= to_n;
                      a_ox <= to_n;
                      a_g <= to_n;
                      a_ky <= to_n;
                      a_kx <= to_n;
                      address <= to_n;
                      if (n_end) state <= FLUSH;
                    end
                  end
                end
              end
            end
          end
        end

        FLUSH: begin
          layer_timer_flush <= layer_timer_flush - 16'd1;
          if (layer_timer_flush == 16'd0) begin
            layer_cycles[layer[LA-1:0]] <= timer;
            odd <= !odd;
            layer <= layer + 16'd1;
            fetch_address <= {layer[LA-1:0] + 1'b1, 3'd0};
            fetch_count <= 4'd0;
            state <= layer + 16'd1 == layers ? SEND : FETCH;
            send_address <= 0;
            send_valid <= 1'b0;
            send_left <= 16'd0;
            send_row <= 16'd0;
            send_item <= 16'd0;
          end
        end

        SEND: begin
          send_valid <= !sent_all && !(send_item_end && send_item == items - 16'd1);
          if (sending) begin
            send_address <= send_next;
            send_left <= send_short ? 16'd0 : send_rest - SIMD;
          end
          if (send_row_end) send_row <= send_item_end ? 16'd0 : send_row + 16'd1;
          if (send_item_end) begin
            send_item <= send_item + 16'd1;
            items_done <= items_done + 32'd1;
            if (send_item == items - 16'd1) sent_all <= 1'b1;
          end
          if (sent_all && (!final_tile || pack_empty)) begin
            send_valid <= 1'b0;
            sent_all <= 1'b0;
            items <= 16'd0;
            state <= final_tile ? IDLE : FILL;
          end
        end

        default: ;  // FAILED: what arrives is dropped until the host clears the error.
      endcase
    end
  end
endmodule
`default_nettype wire
